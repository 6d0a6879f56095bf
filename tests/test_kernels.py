"""The native kernels against float64 arithmetic on the weight that a QuantWeight defines.

Every instruction set of this machine is forced in turn. How far a result may be from the exact one is derived, not
chosen (:func:`error_bound`), and what must be exact is compared bit for bit: packing, digits of inputs, and results
for another number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.runtime import native
from bittern.weight import BITS, QuantSpec, QuantWeight

if not native.available():
    pytest.skip(f"no native library: {native.why_not()}", allow_module_level=True)

SETS = native.instruction_sets()
ROWS = (1, 2, 7, 16, 33, 256)
LARGEST_DIGIT = {"a16": 32639, "a8": 127}
LONGEST_CHUNK = {"a16": 128, "a8": 32}
HALF_ULP = 2.0**-24


@dataclass(frozen=True)
class Case:
    """A matrix and its inputs. ``zeros``: mid, any, lowest, highest. ``inputs``: gauss, outliers, sparse, strided."""

    out_features: int
    in_features: int
    group_size: int
    zeros: str = "any"
    inputs: str = "gauss"
    scale_type: torch.dtype = torch.float16
    act_order: bool = False
    constant_groups: bool = False

    def __str__(self) -> str:
        more = [name for name in ("act_order", "constant_groups") if getattr(self, name)]
        return "-".join([f"{self.out_features}x{self.in_features}g{self.group_size}", self.zeros, self.inputs, *more])


CASES = [
    Case(1, 32, 32),
    Case(15, 100, 32, inputs="outliers"),  # a ragged last group
    Case(16, 96, 96, zeros="mid"),
    Case(17, 100, -1, zeros="lowest", inputs="strided", scale_type=torch.float32),
    Case(33, 576, 64, zeros="mid", inputs="outliers"),
    Case(33, 576, 96, zeros="highest", inputs="sparse", constant_groups=True),
    Case(48, 40, 8),  # groups that are filled up
    Case(65, 300, 48, inputs="outliers", act_order=True),
    Case(100, 576, -1, inputs="outliers"),  # more than one chunk a group, the last one short
    Case(100, 1536, 128, act_order=True, scale_type=torch.float32),
    Case(576, 576, 128, zeros="mid", inputs="outliers"),  # a ragged last group, several jobs
    Case(96, 1536, 200, constant_groups=True, inputs="strided"),
]


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this machine, forced."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed, and is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def make_weight(case: Case, bits: int) -> QuantWeight:
    random = generator(bits + case.in_features)
    spec = QuantSpec(bits, case.group_size, sym=case.zeros == "mid")
    shape = (case.out_features, spec.groups(case.in_features))
    codes = torch.randint(0, 2**bits, (case.out_features, case.in_features), generator=random, dtype=torch.uint8)
    fixed = {"mid": spec.mid_code, "lowest": 0, "highest": spec.max_code}
    if case.zeros in fixed:
        zeros = torch.full(shape, fixed[case.zeros], dtype=torch.uint8)
    else:
        zeros = torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)
    scales = (torch.randn(shape, generator=random) * 0.02).to(case.scale_type)
    g_idx = None
    if case.act_order:
        columns = torch.arange(case.in_features) // spec.columns_per_group(case.in_features)
        g_idx = columns[torch.randperm(case.in_features, generator=random)].int()
    if case.constant_groups:
        width = spec.columns_per_group(case.in_features)
        codes[:, :width] = zeros[:, :1]  # weights of 0
        codes[:, width : 2 * width] = spec.max_code
        scales[:, 2] = 0
    return QuantWeight(codes, scales, zeros, spec, g_idx)


@cache
def make_inputs(case: Case) -> Tensor:
    """(256, in_features)."""
    rows, columns = max(ROWS), case.in_features
    padding = 5 if case.inputs == "strided" else 0
    x = torch.randn(rows, columns + padding, generator=generator(1))[:, :columns]
    if case.inputs == "outliers":
        x[:, torch.randperm(columns, generator=generator(2))[: 2 + columns // 100]] *= 60
    if case.inputs == "sparse":
        x[::3] = 0
        x[1::3, : columns // 2] = 0
    return x


@cache
def exact(case: Case, bits: int) -> Tensor:
    """float64 (256, out_features)."""
    return make_inputs(case).double() @ make_weight(case, bits).dequantize(torch.float64).T


def pack(weight: QuantWeight) -> tuple[native.Matrix, object]:
    """The matrix, and what must live as long as it does."""
    tensors = native.pack(weight)
    group_size = min(weight.spec.columns_per_group(weight.in_features), weight.in_features)
    matrix = native.matrix(weight.out_features, weight.in_features, weight.spec.bits, group_size, tensors)
    return matrix, tensors


def stored_order(weight: QuantWeight) -> Tensor:
    return torch.argsort(weight.group_index(), stable=True)


def steps(weight: QuantWeight, x: Tensor, activations: str) -> Tensor:
    """The distance of two digits for every input: float64, as x. An input is at most half of it from its digit."""
    result = torch.empty_like(x, dtype=torch.float64)
    groups = weight.group_index()
    for group in range(weight.scales.shape[1]):
        members = torch.nonzero(groups == group)[:, 0]
        for start in range(0, len(members), LONGEST_CHUNK[activations]):
            columns = members[start : start + LONGEST_CHUNK[activations]]
            result[:, columns] = x[:, columns].double().abs().amax(1, keepdim=True) / LARGEST_DIGIT[activations]
    return result


def rounding_bound(weight: QuantWeight, x: Tensor) -> Tensor:
    """What fp32 arithmetic may add, float64 (rows, out_features).

    The integer dot products are exact. Turning one into a float, taking zero * sum off, multiplying by both scales and
    adding up chunks and groups rounds at most n = chunks + groups + 8 times on the way of any term to the result, each
    time by at most 2^-24 of a partial sum, and no partial sum is larger than the sum of |scale| (code + zero) |x|.
    There are never more chunks than in_features / 32 + groups.
    """
    columns = weight.group_index()
    magnitudes = weight.codes.double() + weight.zeros.double()[:, columns]
    magnitudes *= weight.scales.double().abs()[:, columns]
    rounded = weight.in_features / 32 + 2 * weight.scales.shape[1] + 8
    return rounded * HALF_ULP * 1.01 * (x.double().abs() @ magnitudes.T)


def error_bound(weight: QuantWeight, x: Tensor, activations: str) -> Tensor:
    """How far a result may be from the exact one, float64 (rows, out_features).

    With x_i = step_c(i) (digit_i + e_i) and |e_i| <= 1/2, rounding inputs changes y_o = sum of w_oi x_i by at most
    sum of |w_oi| step_c(i) / 2. The quotient x / step itself is an fp32 number of at most 32639 that was made with
    two roundings, and the step with one: |e_i| <= 1/2 + 32639 * 3 * 2^-24 = 0.506 (0.5001 with 127).
    """
    half = 0.5 + LARGEST_DIGIT[activations] * 3 * HALF_ULP
    inputs = half * steps(weight, x, activations) @ weight.dequantize(torch.float64).abs().T
    return inputs + rounding_bound(weight, x)


@pytest.mark.parametrize("activations", ["a16", "a8"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_multiplies_within_the_derived_bound(instructions: str, case: Case, bits: int, activations: str) -> None:
    weight, x, expected = make_weight(case, bits), make_inputs(case), exact(case, bits)
    matrix, alive = pack(weight)
    bound = error_bound(weight, x, activations)
    for rows in ROWS:
        (y,) = native.linear(x[:rows], [matrix], activations)
        error = (y.double() - expected[:rows]).abs()
        assert bool((error <= bound[:rows]).all()), f"{rows} rows: {(error / bound[:rows]).max()} of the bound"
        if activations == "a16":
            assert error.norm() <= 2e-4 * expected[:rows].norm()
    assert alive


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacks_what_was_packed(instructions: str, case: Case, bits: int) -> None:
    weight = make_weight(case, bits)
    matrix, alive = pack(weight)
    expected = weight.dequantize()[:, stored_order(weight)]
    assert torch.equal(native.dequantize(matrix), expected)
    middle = case.out_features // 2
    assert torch.equal(native.dequantize(matrix, middle), expected[middle:])
    assert torch.equal(native.dequantize(matrix, middle, middle), expected[:0])
    assert alive


@pytest.mark.parametrize("activations", ["a16", "a8"])
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_and_digits_do_not_saturate(instructions: str, bits: int, activations: str) -> None:
    # Every input is the largest digit, of either sign: the sum of each instruction is as large as it can be. Digits
    # are exact here, so what is left is the rounding of fp32.
    out_features, in_features = 33, 512
    spec = QuantSpec(bits, 128, sym=False)
    shape = (out_features, spec.groups(in_features))
    codes = torch.full((out_features, in_features), spec.max_code, dtype=torch.uint8)
    weight = QuantWeight(codes, torch.ones(shape), torch.zeros(shape, dtype=torch.uint8), spec)
    matrix, alive = pack(weight)
    x = torch.ones(4, in_features)
    x[1] = -1
    x[2, ::2] = -1
    x[3, 1::3] = 255 / 256  # lower halves of -128
    (y,) = native.linear(x, [matrix], activations)
    expected = x.double() @ weight.dequantize(torch.float64).T
    error, bound = (y.double() - expected).abs(), rounding_bound(weight, x)
    assert bool((error[:3] <= bound[:3]).all())
    assert bool((error <= error_bound(weight, x, activations)).all())
    assert alive


@pytest.mark.parametrize("activations", ["a16", "a8"])
def test_digits_are_the_same_for_all_instruction_sets(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the identity for a weight, a result is scale * digit, rounded once.
    size = 272
    spec = QuantSpec(8, 96, sym=False)
    shape = (size, spec.groups(size))
    zeros = torch.zeros(shape, dtype=torch.uint8)
    weight = QuantWeight(torch.eye(size, dtype=torch.uint8), torch.ones(shape), zeros, spec)
    x = torch.randn(64, size, generator=generator()) * torch.logspace(-30, 30, 64)[:, None]
    x[7] = torch.arange(size).float() - 130.5  # ties
    found = {}
    for name in SETS:
        monkeypatch.setenv(native.VARIABLE, name)
        matrix, alive = pack(weight)
        found[name] = native.linear(x, [matrix], activations)[0]
        assert alive
        assert torch.equal(found[name], found["scalar"])
    digits = found["scalar"].double() / steps(weight, x, activations)
    assert bool(((digits - digits.round()).abs() < 0.01).all())
    assert digits.abs().max().round() == LARGEST_DIGIT[activations]


@pytest.mark.parametrize("activations", ["a16", "a8"])
def test_inputs_that_are_no_numbers_show_in_the_result(instructions: str, activations: str) -> None:
    case = CASES[1]
    matrix, alive = pack(make_weight(case, 4))
    x = make_inputs(case)[:7].clone()
    x[0, 3], x[1, 50], x[2, 99] = torch.inf, -torch.inf, torch.nan
    x[3] = 1e-41  # too small for a digit of its own: as good as 0
    x[4] = 0
    x[5] *= 1e30
    (y,) = native.linear(x, [matrix], activations)
    assert not y[:3].isfinite().any()
    assert y[3].abs().max() < 1e-37
    assert torch.equal(y[4], torch.zeros(case.out_features))
    assert bool(y[5:].isfinite().all())
    assert alive


@pytest.mark.parametrize("activations", ["a16", "a8"])
@pytest.mark.parametrize("bits", BITS)
def test_threads_and_company_change_no_bit(instructions: str, bits: int, activations: str, threads: None) -> None:
    cases = [CASES[4], CASES[5], CASES[10], CASES[8]]  # other group sizes, so other digits, of one input
    weights = [make_weight(case, bits) for case in cases]
    packed = [pack(weight) for weight in weights]
    dense = torch.randn(50, 576, generator=generator())
    matrices = [matrix for matrix, _ in packed] + [native.dense_matrix(dense)]
    x = make_inputs(CASES[4])[:133]
    torch.set_num_threads(1)
    alone = [native.linear(x, [matrix], activations)[0] for matrix in matrices]
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        for _ in range(3):
            together = native.linear(x, matrices, activations)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        first = native.linear(x[:1], matrices, activations)
        again = native.linear(x[:1], matrices, activations)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("activations", ["a16", "a8"])
def test_siblings_share_digits_and_nothing_else(instructions: str, activations: str) -> None:
    # As q, k and v do: one input and group size, other numbers of rows and bits.
    cases = [(Case(out_features, 576, 64), bits) for out_features, bits in ((130, 8), (40, 4), (7, 2), (200, 3))]
    packed = [pack(make_weight(case, bits)) for case, bits in cases]
    x = make_inputs(cases[0][0])[:19]
    together = native.linear(x, [matrix for matrix, _ in packed], activations)
    for (case, bits), y in zip(cases, together, strict=True):
        error = (y.double() - exact(case, bits)[:19]).abs()
        assert bool((error <= error_bound(make_weight(case, bits), x, activations)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (15, 33), (33, 576), (130, 100), (49152 // 64, 72)])
def test_dense_matrices(instructions: str, dtype: torch.dtype, out_features: int, in_features: int) -> None:
    weight = torch.randn(out_features, in_features, generator=generator()).to(dtype)
    if dtype == torch.float16:
        weight[0, 0] = 3e-7  # subnormal
    x = torch.randn(256, in_features + 3, generator=generator(1))[:, :in_features]
    matrix = native.dense_matrix(weight)
    for rows in ROWS:
        (y,) = native.linear(x[:rows], [matrix])
        error = (y.double() - x[:rows].double() @ weight.double().T).abs()
        # in_features products and sums, each within half a unit of 24 bits of a partial sum.
        bound = (in_features + 1) * HALF_ULP * 1.01 * (x[:rows].double().abs() @ weight.double().abs().T)
        assert bool((error <= bound).all())


def test_results_of_instruction_sets_differ_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in BITS:
        weight, x = make_weight(CASES[9], bits), make_inputs(CASES[9])[:33]
        found = {}
        for name in SETS:
            monkeypatch.setenv(native.VARIABLE, name)
            matrix, alive = pack(weight)
            found[name] = native.linear(x, [matrix])[0]
            assert alive
        slack = 2 * rounding_bound(weight, x)
        for name, y in found.items():
            assert bool(((y - found["scalar"]).abs() <= slack).all()), name


def test_no_rows_no_work(instructions: str) -> None:
    matrix, alive = pack(make_weight(CASES[0], 4))
    assert native.linear(torch.empty(0, 32), [matrix])[0].shape == (0, 1)
    assert alive


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 5},
        {"type": 4},
        {"type": -1},
        {"group_size": 0},
        {"out_features": 0},
        {"in_features": -1},
        {"scale_type": 0},
        {"codes": None},
        {"scales": None},
    ],
    ids=str,
)
def test_a_matrix_that_cannot_be_is_an_error(changes: dict[str, int | None]) -> None:
    matrix, alive = pack(make_weight(CASES[1], 4))
    wrong = native.Matrix.from_buffer_copy(matrix)
    for name, value in changes.items():
        setattr(wrong, name, value)
    out = torch.zeros(2, 100)
    pointer = ctypes.c_void_p(out.data_ptr())
    matrices = (ctypes.c_void_p * 1)(ctypes.addressof(wrong))
    strides = (ctypes.c_ssize_t * 1)(100)
    library, context = native.library(), native.context()
    assert library.bt_linear(context, matrices, 1, 0, 2, pointer, 100, (ctypes.c_void_p * 1)(pointer), strides) == -1
    assert library.bt_dequantize(context, ctypes.addressof(wrong), 0, 1, pointer) == -1
    assert not out.any()
    assert alive


def test_bad_arguments_are_errors() -> None:
    matrix, alive = pack(make_weight(CASES[1], 4))
    x, library, context = torch.zeros(16, 100), native.library(), native.context()
    for start, stop in ((-1, 2), (2, 1), (0, 16)):
        assert library.bt_dequantize(context, ctypes.addressof(matrix), start, stop, x.data_ptr()) == -1
    with pytest.raises(BitternError, match=r"^native runtime: bt_linear: bad argument$"):
        native.linear(x, [matrix] * 17)
    with pytest.raises(BitternError, match="bt_linear: bad argument"):
        native.linear(x, [])
    with pytest.raises(BitternError, match="bt_linear: bad argument"):
        native.linear(x, [matrix, pack(make_weight(CASES[2], 4))[0]])
    assert library.bt_pack(context, 16, 32, 5, 32, x.data_ptr(), 32, 1, x.data_ptr()) == -1
    assert library.bt_pack(context, 16, 32, 4, 0, x.data_ptr(), 32, 1, x.data_ptr()) == -1
    assert alive


def test_a_context_needs_threads_and_an_instruction_set_of_this_machine() -> None:
    library, context = native.library(), ctypes.c_void_p()
    missing = next(i for i in range(len(native.INSTRUCTIONS)) if not library.bt_has(i))
    assert library.bt_open(0, 0, ctypes.byref(context)) == -1
    assert library.bt_open(257, 0, ctypes.byref(context)) == -1
    assert library.bt_open(1, missing, ctypes.byref(context)) == -4
    assert library.bt_open(1, 99, ctypes.byref(context)) == -4
    assert library.bt_open(1, 0, None) == -1
    assert context.value is None


def test_an_unknown_instruction_set_is_a_mistake_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "mmx")
    with pytest.raises(BitternError) as caught:
        native.context()
    assert str(caught.value) == f"BITTERN_INSTRUCTIONS: expected one of {', '.join(SETS)}, found 'mmx'"


def test_the_best_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert native.instructions() == SETS[-1]
    assert SETS[0] == "scalar"
