"""Groups that must not be divided, and where they go: pure bookkeeping on names, hashes and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from synthaug.formats.near_duplicates import Pairs
from synthaug.formats.split_ledger import Ledger
from synthaug.records import SPLITS

# A training image that also occurs in test is of no use to train on, a test image that occurs in train is still
# a test image: the split that measures keeps its own.
_PRIORITY = {"train": 0, "validation": 1, "test": 2}
_LARGEST_SHARE, _LARGEST_AT_LEAST = 0.25, 20
_HALVINGS = 6


@dataclass
class Groups:
    """Groups of rows: `group[k]` is the group of the k-th row, an index in `keys` and `pins`."""

    group: np.ndarray  # int64, one a row
    keys: list[str]  # pseudonyms
    pins: list[str | None]  # the split a group has from an earlier run
    held_back: np.ndarray  # bool, one a row: nearly or exactly an image of another split


@dataclass
class _Forest:
    """Union-find over pseudonyms. Two trees with different splits are never joined."""

    parent: dict[str, str] = field(default_factory=dict)
    pin: dict[str, str | None] = field(default_factory=dict)

    def add(self, node: str, pin: str | None) -> None:
        if node not in self.parent:
            self.parent[node] = node
            self.pin[node] = pin

    def root(self, node: str) -> str:
        path = []
        while self.parent[node] != node:
            path.append(node)
            node = self.parent[node]
        for passed in path:
            self.parent[passed] = node
        return node

    def join(self, one: str, other: str) -> bool:
        """Join two trees; False where their splits differ."""
        # The smallest of the names that have a split, else the smallest of all, stays on top: so the name of a tree
        # does not depend on the order of joining, and stays the same when new rows come.
        low, high = sorted((self.root(one), self.root(other)), key=lambda node: (self.pin[node] is None, node))
        pins = {self.pin[low], self.pin[high]} - {None}
        if low == high:
            return True
        if len(pins) > 1:
            return False
        self.parent[high] = low
        self.pin[low] = pins.pop() if pins else None
        return True


def form_groups(hashes: Sequence[str], names: Sequence[str | None], ledger: Ledger, pairs: Pairs | None) -> Groups:
    """Join rows into groups: by name, by exact copies, and by near-duplicates.

    What an earlier run placed stays there. New rows that would tie groups of different splits together are held
    back instead.

    Args:
        hashes: Content of each row.
        names: Group of each row, or None where it has none.
        ledger: What earlier runs remembered.
        pairs: What connects near-duplicates, as positions of rows; None where groups are given.
    """
    known = [ledger.group_of_image(content) for content in hashes]
    nodes = [
        ledger.key.group(name) if name is not None else earlier or ledger.key.image(content)
        for content, name, earlier in zip(hashes, names, known, strict=True)
    ]
    forest = _Forest()
    for node in (*nodes, *(earlier for earlier in known if earlier is not None)):
        forest.add(node, ledger.split_of_group(node))
    held_back = np.zeros(len(hashes), dtype=bool)
    for row, (node, earlier) in enumerate(zip(nodes, known, strict=True)):
        if earlier is not None and not forest.join(node, earlier):
            held_back[row] = True
    first_with: dict[str, int] = {}
    for row, content in enumerate(hashes):
        # Copies that cannot be joined are dealt with at the end, by `copies_held_back`.
        forest.join(nodes[first_with.setdefault(content, row)], nodes[row])
    if pairs is not None:
        _join_clusters(forest, nodes, pairs, held_back, [earlier is not None for earlier in known])
    return _numbered(nodes, forest, held_back)


def _join_clusters(
    forest: _Forest, nodes: list[str], pairs: Pairs, held_back: np.ndarray, known: Sequence[bool]
) -> None:
    """Join near-duplicates; new images of a cluster whose old ones are in several splits are held back."""
    clusters = _Forest()
    for node in nodes:
        clusters.add(node, None)
    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        clusters.join(nodes[first], nodes[second])
    members: dict[str, list[int]] = {}
    for row, node in enumerate(nodes):
        members.setdefault(clusters.root(node), []).append(row)
    for cluster in members.values():
        if len({forest.pin[forest.root(nodes[row])] for row in cluster} - {None}) > 1:
            held_back[[row for row in cluster if not known[row]]] = True
        else:
            for row in cluster[1:]:
                forest.join(nodes[cluster[0]], nodes[row])


def _numbered(nodes: list[str], forest: _Forest, held_back: np.ndarray) -> Groups:
    roots = [forest.root(node) for node in nodes]
    keys = sorted(set(roots))
    number = {key: position for position, key in enumerate(keys)}
    return Groups(
        group=np.array([number[root] for root in roots], dtype=np.int64),
        keys=keys,
        pins=[forest.pin[key] for key in keys],
        held_back=held_back,
    )


def without_giants(pairs: Pairs, count: int) -> tuple[Pairs, float]:
    """Break clusters that hold more than a quarter of the images, by halving the distance within them.

    Where everything resembles something that resembles something else, chains run through the whole set, and a
    single group cannot be divided at all.

    Args:
        pairs: Near-duplicates among `count` images.

    Returns:
        The pairs that remain, and the smallest distance that was used anywhere.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    largest = max(_LARGEST_AT_LEAST, int(_LARGEST_SHARE * count))
    limit = np.full(count, pairs.limit)
    for halving in range(_HALVINGS + 1):
        near = pairs.distance <= np.minimum(limit[pairs.first], limit[pairs.second])
        ends = (pairs.first[near], pairs.second[near])
        graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(count, count))
        cluster = connected_components(graph, directed=False)[1]
        giant = np.bincount(cluster, minlength=1)[cluster] > largest
        if not giant.any():
            break
        limit[giant] = limit[giant] / 2 if halving < _HALVINGS - 1 else -1.0
    kept = Pairs(*ends, pairs.distance[near], pairs.limit)
    return kept, float(max(0.0, limit.min(initial=pairs.limit)))


def copies_held_back(hashes: Sequence[str], splits: Sequence[str], known: Sequence[bool]) -> np.ndarray:
    """True for every row that is an exact copy of a row in another split, but for the split that keeps its own.

    Kept is the split of a row that was known before, else test before validation before train.
    """
    best: dict[str, tuple[bool, int]] = {}
    for content, split, old in zip(hashes, splits, known, strict=True):
        best[content] = max(best.get(content, (False, -1)), (old, _PRIORITY[split]))
    kept = [best[content][1] for content in hashes]
    return np.array([_PRIORITY[split] != keeper for split, keeper in zip(splits, kept, strict=True)], dtype=bool)


@dataclass
class _Tally:
    """Images of each class in each split, and what there should be."""

    shares: Mapping[str, float]
    totals: Counter[int]
    counts: dict[str, Counter[int]]

    def cost(self, split: str, classes: Mapping[int, int]) -> float:
        """By how much the squared distance to the asked counts grows, each class in its own proportion."""
        share, counts = self.shares[split], self.counts[split]
        return sum(n * (2 * counts[label] + n) / (share * self.totals[label]) - 2 * n for label, n in classes.items())

    def add(self, split: str, classes: Mapping[int, int], sign: int = 1) -> None:
        for label, n in classes.items():
            self.counts[split][label] += sign * n


def place_groups(
    classes: Sequence[Mapping[int, int]], pins: Sequence[str | None], keys: Sequence[str], shares: Mapping[str, float]
) -> list[str]:
    """Choose a split for every group that has none, so that each class comes near the asked shares.

    Large groups are placed first, groups of one size in the order of their keyed hashes. Then, if that can be
    done with groups that are new, every class gets an image in train, and one in validation.

    Args:
        classes: For each group, label to number of images.
        pins: For each group, the split it has already.
        keys: For each group, its pseudonym.
        shares: Split to share of the images, adding up to 1; splits with a share of 0 get nothing new.
    """
    totals: Counter[int] = Counter()
    for group in classes:
        totals.update(group)
    tally = _Tally({name: share for name, share in shares.items() if share > 0}, totals, {s: Counter() for s in SPLITS})
    splits: list[str] = [pin or "" for pin in pins]
    for group, pin in zip(classes, pins, strict=True):
        if pin is not None:
            tally.add(pin, group)
    new = [number for number, pin in enumerate(pins) if pin is None]
    new.sort(key=lambda number: (-sum(classes[number].values()), keys[number]))
    for number in new:
        # Equal costs: the earlier name in SPLITS, train first.
        splits[number] = min(tally.shares, key=lambda name: (tally.cost(name, classes[number]), SPLITS.index(name)))
        tally.add(splits[number], classes[number])
    small_first = new[::-1]
    for label in sorted(totals):
        if not tally.counts["train"][label]:
            _move(label, "train", small_first, classes, splits, tally)
    for label in sorted(totals):
        if "validation" in tally.shares and not tally.counts["validation"][label]:
            _move(label, "validation", small_first, classes, splits, tally)
    return splits


def _move(
    label: int,
    target: str,
    order: Iterable[int],
    classes: Sequence[Mapping[int, int]],
    splits: list[str],
    tally: _Tally,
) -> None:
    """Move one new group with images of a class to `target`; never the last one of a class out of train."""
    for number in order:
        group = classes[number]
        if group.get(label, 0) == 0 or (target == "validation" and splits[number] != "train"):
            continue
        if target == "validation" and any(tally.counts["train"][other] <= n for other, n in group.items() if n):
            continue
        tally.add(splits[number], group, -1)
        splits[number] = target
        tally.add(target, group)
        return
