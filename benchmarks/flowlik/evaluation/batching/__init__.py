"""Any number of items through an estimator, in batches that fit into memory."""
