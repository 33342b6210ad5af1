"""Several processes that measure one Fisher together; and one alone, for which all of it is nothing to do."""
