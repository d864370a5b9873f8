"""Images a batch at a time: every image once, and a tick after each part."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetdeploy.batches import images_with_spikes, parts


@given(st.integers(0, 50), st.integers(1, 60))
def test_parts_cover_everything_once_and_in_order(count: int, size: int) -> None:
    everything, done = list(range(count)), list[int]()
    found = [everything[part] for part in parts(count, size, done.append)]
    assert [k for part in found for k in part] == everything
    assert all(len(part) == size for part in found[:-1])
    assert done == [len(part) for part in found]


def test_a_part_is_ticked_off_when_it_is_done() -> None:
    done: list[int] = []
    running = parts(5, 3, done.append)
    assert (next(running), done) == (slice(0, 3), [])
    assert (next(running), done) == (slice(3, 5), [3])
    assert (list(running), done) == ([], [3, 2])


@pytest.mark.parametrize(
    ("size", "fault"), [(0, "at least 1, got 0"), (1.5, r"a whole number, got 1\.5"), ("2", "a whole number, got '2'")]
)
def test_a_batch_of_no_whole_number_of_images_is_refused(size: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"the size of a batch must be {fault}"):
        next(parts(3, size))


def test_a_batch_has_as_many_images_as_fit_with_all_their_spikes() -> None:
    layers = [{"shape": [64, 32, 32]}, {"shape": [1000]}]
    per_image = (64 * 32 * 32 + 1000) * 3 * 4
    assert images_with_spikes(layers, T=3) == 200_000_000 // per_image == 250
    assert images_with_spikes(layers, T=1_000_000) == 1
