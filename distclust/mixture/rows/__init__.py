"""The rows, by family; `methods.METHODS` is the table."""
