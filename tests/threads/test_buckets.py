"""Which parameters share a bucket."""

from __future__ import annotations

import pytest
import torch

from ringred.buckets import Bucket, Entry, assign
from ringred.data_parallel.streaming import copier


def test_a_bucket_is_closed_at_its_cap_and_the_first_cap_is_its_own() -> None:
    entries = [Entry(4, "f")] * 10
    order = list(reversed(range(10)))
    assert assign(entries, order, [4, 12]) == [[9], [8, 7, 6], [5, 4, 3], [2, 1, 0]]
    assert assign(entries, order, [1000]) == [order]
    assert assign(entries, order, [1]) == [[index] for index in order]


def test_what_differs_in_kind_does_not_share_and_buckets_come_as_they_fill() -> None:
    entries = [Entry(4, "f" if index % 2 else "h") for index in range(6)]
    assert assign(entries, [5, 4, 3, 2, 1, 0], [8]) == [[5, 3], [4, 2], [1], [0]]


def test_views_have_the_shape_and_strides_of_their_parameters() -> None:
    channels_last = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last)
    overlapping = torch.empty(6).as_strided((2, 3), (1, 1))
    parameters = [torch.empty(2, 3), channels_last, torch.empty(()), torch.empty(0), overlapping]
    bucket = Bucket([0, 1, 2, 3, 4], parameters, lambda count, dtype: torch.empty(count, dtype=dtype))
    assert bucket.flat.numel() == 6 + 48 + 1 + 0 + 6
    assert [view.shape for view in bucket.views] == [p.shape for p in parameters]
    assert bucket.views[1].stride() == channels_last.stride()
    assert bucket.views[4].is_contiguous()
    gradients = [torch.randn(p.shape) for p in parameters]
    for place, gradient in enumerate(gradients):
        bucket.put(place, gradient)
    assert all(torch.equal(view, g) for view, g in zip(bucket.views, gradients, strict=True))
    bucket.put(0, None)
    assert not bucket.views[0].any()
    bucket.put(1, bucket.views[1])
    assert torch.equal(bucket.views[1], gradients[1])
    assert bucket.nbytes == 4 * 61


@pytest.mark.parametrize(
    "kind", ["plain", "transposed", "channels_last", "of another dtype", "conjugate", "short", "at odd places"]
)
def test_gradients_of_any_kind_are_copied_past_the_cache_unchanged(kind: str) -> None:
    shape = {"channels_last": (3, 32, 37, 41), "short": (17,)}.get(kind, (700, 301))
    gradient = torch.randn(shape)
    if kind == "transposed":
        gradient = torch.randn(301, 700).t()
    elif kind == "channels_last":
        gradient = gradient.to(memory_format=torch.channels_last)
    elif kind == "conjugate":
        gradient = torch.randn(shape, dtype=torch.complex64).conj()
    parameters = [
        torch.nn.Parameter(torch.zeros(5 if kind == "at odd places" else 16)),
        torch.nn.Parameter(torch.empty_like(gradient)),
    ]
    if gradient.is_complex():
        parameters[0] = torch.nn.Parameter(torch.zeros(16, dtype=gradient.dtype))
    bucket = Bucket([0, 1], parameters, lambda n, dtype: torch.empty(n, dtype=dtype), copier(64 << 20))
    given = gradient.double() if kind == "of another dtype" else gradient
    bucket.put(1, given)
    assert torch.equal(bucket.views[1], gradient.resolve_conj())
    assert not bucket.views[0].any(), "nothing beside it is written"
