"""A pretrained causal LM: load it, extend its vocabulary, adapt it, save it whole."""
