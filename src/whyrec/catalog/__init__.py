"""Items and interactions: readers for raw logs, k-core, splits, and the dataset that they make."""
