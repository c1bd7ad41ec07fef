"""A page in the browser on which a checkpoint can be tried."""
