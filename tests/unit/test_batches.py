"""How prompts are cut into batches, and a cell into groups of rows: everything once, nothing padded, in bounds."""

import itertools
from collections import Counter

import pytest
import torch
from selfrepair.effects import measure, runs
from selfrepair.effects.runs import Batch, batches
from selfrepair.prompts.prompt import Prompt

PROMPTS = [Prompt(n, tuple(range(3 + n % 4)), target=n) for n in range(23)]


@pytest.mark.parametrize("tokens", [1, 5, 12, 1000])
def test_every_prompt_once_and_one_length_each(tokens):
    found = list(batches(PROMPTS, tokens))
    assert Counter(p.id for batch in found for p in batch.prompts) == Counter(range(23))
    for batch in found:
        assert {len(p.input_ids) for p in batch.prompts} == {batch.length}
        assert len(batch.prompts) * batch.length <= tokens or len(batch.prompts) == 1
        assert batch.input_ids(torch.device("cpu")).tolist() == [list(p.input_ids) for p in batch.prompts]


def test_order_within_a_length_is_kept():
    (batch,) = (b for b in batches(PROMPTS, 1000) if b.length == 4)
    assert [p.id for p in batch.prompts] == [1, 5, 9, 13, 17, 21]


def test_a_batch_has_limits_of_its_own():
    """However many rows are allowed: keys, values and logits of a clean run are larger than rows."""
    short = [Prompt(n, (1, 2)) for n in range(3000)]
    long = [Prompt(n, tuple(range(1000))) for n in range(30)]
    assert max(len(b.prompts) for b in batches(short, 10**9)) == runs._PROMPTS
    assert max(len(b.prompts) * b.length for b in batches(long, 10**9)) <= runs._TOKENS


def test_targets_are_given_for_all_or_none():
    assert Batch((PROMPTS[0], PROMPTS[4])).targets().tolist() == [0, 4]
    assert Batch((PROMPTS[0], Prompt(9, (1, 2, 3)))).targets() is None


class _Runs:
    def __init__(self, tokens, all_kept):
        self.batches, self.all_kept = list(batches(PROMPTS, tokens)), all_kept


@pytest.mark.parametrize("path", ["rows", "decode", "trimmed", "full"])
@pytest.mark.parametrize("all_kept", [True, False])
def test_groups_cover_the_cell_once_within_the_bound(path, all_kept):
    for tokens, n_draws, rows in itertools.product((6, 40), (1, 3, 7), (1, 10, 64)):
        cell = _Runs(tokens, all_kept)
        seen = Counter()
        for group in measure._rectangles(cell, measure.Settings((), n_draws, "last", path, rows)):
            used = 0
            for rectangle in group:
                batch = cell.batches[rectangle.batch]
                per_row = 1 if path in ("rows", "decode") else batch.length
                used += per_row * len(rectangle.prompts) * len(rectangle.draws)
                chosen = batch.prompts[rectangle.slice]
                seen.update((p.id, draw) for p in chosen for draw in rectangle.draws)
            single = len(group) == 1 and len(group[0].prompts) == len(group[0].draws) == 1
            assert used <= rows or single, (path, tokens, n_draws, rows, group)
            if path != "rows" or not all_kept:
                assert len({rectangle.batch for rectangle in group}) == 1
        assert seen == Counter((p.id, draw) for p in PROMPTS for draw in range(n_draws))


def test_rows_of_different_lengths_share_a_group_where_they_may():
    (group,) = measure._rectangles(_Runs(1000, True), measure.Settings((), 2, "last", "rows", 1000))
    assert len({rectangle.batch for rectangle in group}) == 4


def test_halves_are_the_whole():
    def pairs(group):
        return Counter((r.batch, p, d) for r in group for p in r.prompts for d in r.draws)

    for shape in ([(5, 3), (2, 3)], [(5, 3)], [(1, 7)]):
        group = [measure._Rectangle(n, range(p), range(d)) for n, (p, d) in enumerate(shape)]
        one, other = measure._halves(group)
        assert pairs(one) + pairs(other) == pairs(group) and pairs(one) and pairs(other)
    assert measure._halves([measure._Rectangle(0, range(4, 5), range(2, 3))]) is None
