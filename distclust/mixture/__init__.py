"""The mathematics of mixtures; imports torch and nothing else of ours."""
