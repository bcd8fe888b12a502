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
    for tokens, n_sites, n_draws, rows in itertools.product((6, 40), (1, 4), (1, 3, 7), (1, 10, 64)):
        cell = _Runs(tokens, all_kept)
        seen = Counter()
        for group in measure._rectangles(cell, measure.Settings((), n_draws, "last", path, rows), n_sites):
            used = 0
            for rectangle in group:
                batch = cell.batches[rectangle.batch]
                per_row = 1 if path in ("rows", "decode") else batch.length
                used += per_row * sum(_keys([rectangle]).values())
                chosen = batch.prompts[rectangle.slice]
                keys = itertools.product((p.id for p in chosen), rectangle.sites, rectangle.draws)
                seen.update(keys)
            single = sum(_keys(group).values()) == 1
            assert used <= rows or single, (path, tokens, n_sites, n_draws, rows, group)
            if path != "rows" or not all_kept:
                assert len({rectangle.batch for rectangle in group}) == 1
            if path == "decode":
                assert len(group) == 1
        everything = itertools.product((p.id for p in PROMPTS), range(n_sites), range(n_draws))
        assert seen == Counter(everything)


def _keys(group):
    """The (batch, prompt, site, draw) of a group of rectangles, with how often each occurs."""
    return Counter((r.batch, *key) for r in group for key in itertools.product(r.prompts, r.sites, r.draws))


def test_rows_of_different_lengths_share_a_group_where_they_may():
    (group,) = measure._rectangles(_Runs(1000, True), measure.Settings((), 2, "last", "rows", 1000), 5)
    assert len({rectangle.batch for rectangle in group}) == 4


def test_halves_are_the_whole():
    for shape in ([(5, 1, 3), (2, 1, 3)], [(5, 4, 3)], [(1, 3, 7)], [(1, 1, 7)]):
        group = [measure._Rectangle(n, *map(range, sizes)) for n, sizes in enumerate(shape)]
        one, other = measure._halves(group)
        assert _keys(one) + _keys(other) == _keys(group) and _keys(one) and _keys(other)
    assert measure._halves([measure._Rectangle(0, range(4, 5), range(1, 2), range(2, 3))]) is None
