"""A small shop and a few films, with the traps that catalogues set."""

import numpy as np

from whyrec.catalog.dataset import Item
from whyrec.reasoning.facts import FactBook


def item(title: str, *categories: str, brand: str = "") -> Item:
    return Item(title, title, brand, categories, "")


SHOP = [
    item(
        "OPI Nail Lacquer, Big Apple Red", "Beauty", "Makeup", "Nails", "Nail Polish", brand="OPI"
    ),
    item("OPI Nail Lacquer, Bubble Bath", "Beauty", "Makeup", "Nails", "Nail Polish", brand="OPI"),
    item("Essie Ballet Slippers", "Beauty", "Makeup", "Nails", "Nail Polish", brand="Essie"),
    item("Konad Stamping Kit", "Beauty", "Tools", "Nail Art"),
    item("Konad Image Plate", "Beauty", "Tools", "Nail Art"),
    item("Sexy Hair Shampoo", "Beauty", "Hair Care", "Shampoos", brand="WEN by Chaz Dean"),
    item("Cleansing Conditioner", "Beauty", "Hair Care", "Conditioners", brand="WEN by Chaz Dean"),
    item("Argan Oil", "Beauty", "Hair Care", "Creams, Gels & Lotions", brand="e.l.f. Cosmetics"),
    item("", "Beauty"),
    item("Only a title"),
    item("Body Lotion", "Beauty", "Skin Care", "Creams; Oils > All", brand="opi"),
    Item("no text at all"),
]
FILMS = [
    item("Toy Story (1995)", "Animation", "Comedy"),
    item("Toy Story 2 (1999)", "Animation", "Comedy"),
    item("Star Wars (1977)", "Action", "Sci-Fi"),
    item("Empire Strikes Back, The (1980)", "Action", "Sci-Fi", "Drama"),
    item("Star Trek: Generations (1994)", "Action", "Sci-Fi"),
    item("Star Trek III: The Search for Spock (1984)", "Action", "Sci-Fi"),
    item("Heat (1995)", "Action", "Drama"),
    item("Casablanca (1942)", "Drama", "Romance"),
    item("Rebecca (1940)", "Romance", "Thriller"),
    item("Mystery Men", "Comedy"),
    item("Kolya (1996)", "Comedy", "Drama"),
    item("Fargo (1996)", "Crime", "Drama"),
    item("Glory (1989)", "Action", "Drama", "War"),
]


def vectors_of(items: list[Item]) -> np.ndarray:
    """Unit vectors by bag of words, so that like items are near."""
    vectors_ND = np.zeros((len(items), 64), dtype=np.float32)
    for row, one in zip(vectors_ND, items, strict=True):
        for word in f"{one.title} {' '.join(one.categories)} {one.brand}".split():
            row[sum(map(ord, word)) % 64] += 1
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-9)


SHOP_BOOK, FILM_BOOK = FactBook(SHOP), FactBook(FILMS)
