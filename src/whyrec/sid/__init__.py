"""Semantic IDs (SIDs): item vectors, quantisers, unique assignment, vocabulary, trie."""
