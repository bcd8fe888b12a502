"""Random numbers belong to what they are for, not to when they are asked for."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from selfrepair.effects.draws import Key

KEY = Key(0, "facts", "replace-facts")

PINNED_REPLACEMENTS = [20, 18, 24, 0, 21]
PINNED_NORMAL = [1.389887094, 0.69223100, 0.781929135]


def test_a_value_is_what_it_is_in_any_process_and_version():
    """Pinned: another generator or another spelling of the key would change published results."""
    assert KEY.replacements(7, 5, 25).tolist() == PINNED_REPLACEMENTS
    assert KEY.normal(7, 2, (3,)).tolist() == pytest.approx(PINNED_NORMAL, abs=1e-7)


def test_another_process_draws_the_same():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from selfrepair.effects.draws import Key; "
        "print(Key(0, 'facts', 'replace-facts').replacements(7, 5, 25).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(KEY.replacements(7, 5, 25).tolist())


def test_order_and_neighbours_do_not_matter():
    forwards = [KEY.normal(p, d, (4,)) for p in range(3) for d in range(3)]
    backwards = [KEY.normal(p, d, (4,)) for p in reversed(range(3)) for d in reversed(range(3))]
    assert np.array_equal(forwards, backwards[::-1])
    alone = KEY.replacements(2, 4, 9)
    for prompt in range(5):
        KEY.replacements(prompt, 4, 9)
    assert np.array_equal(KEY.replacements(2, 4, 9), alone)


@pytest.mark.parametrize("change", [{"seed": 1}, {"source": "s"}, {"ablation": "noise"}])
def test_every_part_of_the_key_counts(change):
    other = Key(**{**vars(KEY), **change})
    assert not np.array_equal(other.normal(7, 0, (8,)), KEY.normal(7, 0, (8,)))
    assert not np.array_equal(other.replacements(7, 20, 20), KEY.replacements(7, 20, 20))


def test_prompts_and_draws_differ():
    values = [KEY.normal(p, d, (8,)) for p, d in itertools.product(range(4), range(4))]
    assert len({value.tobytes() for value in values}) == 16
    assert KEY.normal(1, 12, (8,)).tobytes() != KEY.normal(11, 2, (8,)).tobytes()


def test_without_replacement_while_the_store_has_enough():
    for prompt in range(50):
        assert sorted(KEY.replacements(prompt, 25, 25)) == list(range(25))
        assert len(set(KEY.replacements(prompt, 15, 25))) == 15


def test_with_more_draws_than_store_every_prompt_serves_before_any_serves_again():
    chosen = KEY.replacements(3, 11, 4)
    counts = np.bincount(chosen, minlength=4)
    assert counts.sum() == 11 and counts.min() == 2 and counts.max() == 3
    assert sorted(chosen[:4]) == sorted(chosen[4:8]) == [0, 1, 2, 3]


def test_more_draws_begin_with_the_fewer():
    """Draw 0 of 5 is draw 0 of 15: adding draws adds to a result."""
    assert np.array_equal(KEY.replacements(3, 15, 25)[:5], KEY.replacements(3, 5, 25))


def test_all_stored_prompts_are_equally_likely():
    first = [KEY.replacements(prompt, 1, 10)[0] for prompt in range(3000)]
    counts = np.bincount(first, minlength=10)
    # Chi-square with 9 degrees of freedom: above 27.9 once in a thousand.
    assert ((counts - 300) ** 2 / 300).sum() < 27.9


def test_noise_is_standard_normal_and_does_not_depend_on_the_layer():
    noise = KEY.normal(0, 0, (20000,))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02


def test_what_is_kept_for_the_next_asker_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        KEY.replacements(7, 5, 25)[0] = 3
