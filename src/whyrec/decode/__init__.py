"""From a trained model to recommended items: exact trie-constrained beams and `Recommender`."""
