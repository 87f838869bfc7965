"""Products with the frozen weights of the base model, where nearly all arithmetic of a step is.

Rows of many tenants go through one product, and still none must get other bits for the company it is in. A matrix
library promises no such thing: it may round a row differently when there are more rows beside it. So it is tried:
`verify_rows` computes, for every weight of a model and every number of rows that a product may have, whether rows come
out with the same bits wherever they lie. Where they do, `frozen_product` takes all rows at once; elsewhere it takes the
rows of each segment by themselves.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

ROWS_MAX = 2048
"""More rows are computed in blocks of so many: there are as many programs to verify."""

_ROWS_STEPS = 8
"""oneDNN makes a program for every number of rows. Rounded up by at most an eighth, there are few of them."""

_linear = (
    torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001  # as torch's own compiler calls it
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)
_Form = tuple[tuple[int, ...], tuple[int, ...]]
_verified: set[_Form] = set()
"""Shapes and strides of the weights with which rows are known to be independent."""


def frozen_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """`x W^T`, [T, O], outside of autograd; the bits of a row depend on no row of another part.

    `sizes` are the rows of each part, and add up to T. `weight_OI` may be a transposed view.

    In float32 on CPUs it is oneDNN's, in full precision: the library behind `torch.mm` does without the wide vectors of
    processors that are not its maker's.
    """
    if not _is_onednn(x_TI, weight_OI):
        return joined([part @ weight_OI.T for part in x_TI.split_with_sizes(list(sizes))])
    if _form(weight_OI) in _verified:
        return joined([_product(rows, weight_OI) for rows in x_TI.split(ROWS_MAX)])
    return joined([_product(part, weight_OI) for part in x_TI.split_with_sizes(list(sizes))])


def is_shareable(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether rows of several parts may go through one product with `weight`, and keep their bits."""
    return _is_onednn(x_TI, weight_OI) and _form(weight_OI) in _verified


def frozen_products(
    x_RI: torch.Tensor,
    index_P: torch.Tensor | None,
    weights_OI: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    """`x[index]`, or all of `x`, through one of `weights` after another, [P, O]: so many rows as `sizes` says.

    The weights have one shape, with which products are shareable.
    """
    assert _linear is not None
    outputs: list[torch.Tensor] = []
    count = x_RI.shape[0] if index_P is None else index_P.shape[0]
    start = 0
    for weight_OI, size in zip(weights_OI, sizes, strict=True):
        end = start + size
        while start < end:
            rows = min(end - start, ROWS_MAX)
            rounded = _rounded(rows)
            # What comes behind is taken along, where it makes a number of rows that there is a program for.
            last = min(start + rounded, count)
            part = (
                x_RI[start:last] if index_P is None else x_RI.index_select(0, index_P[start:last])
            )
            product = _linear(_with_rows(part, rounded), weight_OI, None, "none", [], "")
            outputs.append(product if rows == rounded else product[:rows])
            start += rows
    return joined(outputs)


def verify_rows(weights: Iterable[torch.Tensor]) -> bool:
    """Tries out `weights` [O, I] and their transposes; whether all of them compute rows independently.

    It takes as long as some thirty thousand rows, and leaves behind the programs that passes will need.
    """
    forms = {_form(view): view for weight in weights for view in (weight, weight.T)}
    results = [_verify(view) for view in forms.values()]
    return all(results)


@torch.no_grad()
def _verify(weight_OI: torch.Tensor) -> bool:
    if _linear is None or not weight_OI.is_cpu or weight_OI.dtype is not torch.float32:
        return False
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(ROWS_MAX, weight_OI.shape[1], generator=generator)
    expected = _linear(x_TI, weight_OI, None, "none", [], "")
    for rows in sorted({_rounded(count) for count in range(1, ROWS_MAX + 1)}):
        first = min(7, ROWS_MAX - rows)
        actual = _linear(x_TI[first : first + rows], weight_OI, None, "none", [], "")
        if not torch.equal(actual, expected[first : first + rows]):
            return False
    _verified.add(_form(weight_OI))
    return True


def _is_onednn(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return _linear is not None and x_TI.is_cpu and x_TI.dtype is weight_OI.dtype is torch.float32


def _form(weight_OI: torch.Tensor) -> _Form:
    return tuple(weight_OI.shape), weight_OI.stride()


def _product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    rows = x_TI.shape[0]
    assert _linear is not None
    return _linear(_with_rows(x_TI, _rounded(rows)), weight_OI, None, "none", [], "")[:rows]


def _rounded(rows: int) -> int:
    """A multiple of an eighth of the power of two below `rows`, at least `rows` and eight."""
    step = max(_ROWS_STEPS, (1 << (max(rows, 1).bit_length() - 1)) // _ROWS_STEPS)
    return max(-(-rows // step), 1) * step


def _with_rows(x_TI: torch.Tensor, rows: int) -> torch.Tensor:
    """`x_TI` and whatever comes after it, [rows, I]; what is computed of the rows behind is thrown away."""
    if rows == x_TI.shape[0]:
        return x_TI
    stride, width = x_TI.stride(0), x_TI.shape[1]
    end = x_TI.storage_offset() + (rows - 1) * stride + width
    if x_TI.stride(1) == 1 and end * x_TI.element_size() <= x_TI.untyped_storage().nbytes():
        # The rows that follow in memory will do: a row's product depends on no other row.
        return x_TI.as_strided((rows, width), (stride, 1))
    padded = x_TI.new_zeros(rows, width)
    padded[: x_TI.shape[0]] = x_TI
    return padded


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all `parts` as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
