"""Documents -> sharded Arrow on disk -> batches."""
