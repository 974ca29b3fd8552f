"""What only a GPU can show: real transforms, streams, graphs and memory. Skipped, with the reason, without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import freemerge as fm
import freemerge.experts as fx
from cases import RESPONSES
from freemerge.accumulate import LateSum, add_round, filtered_sum, norm, task_vector_sum
from freemerge.backends import registry
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.registry import named
from freemerge.backends.sparse import SparseVector, Update
from freemerge.backends.torch import TorchBackend
from freemerge.experts.select import select_largest
from freemerge.planner.forms import candidates
from freemerge.responses import Response
from in_memory import finished_sum
from reference import reference_filter
from updates import apply_, expected, mixed_updates

CUDA = fm.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=f"no CUDA backend: {CUDA.reason}")]

# Beyond those of test_parity.py, which runs on a GPU too.
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1009, 1013), (50265, 64), (1, 65537)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def matrix(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("response", RESPONSES, ids=lambda r: type(r).__name__)
def test_results_agree_with_the_formula(shape: tuple[int, int], response: Response, dtype: torch.dtype) -> None:
    x = matrix(*shape, dtype=dtype)
    want = 1.5 * reference_filter(x, response)  # on the GPU, by torch in float64: a tenth of the time
    got = fm.filtered(x, response, scale=1.5, backend="cuda")
    norm = max(float(want.norm()), 0.3 * float(x.double().norm()))
    assert float((got.double() - want).norm()) / norm < TOLERANCE[dtype]
    assert torch.equal(got, fm.filtered(x, response, scale=1.5, backend="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(768, 768), (3072, 768), (4096, 4096), (1024, 11008), (11008, 512), (3, 768, 768)], ids=str
)
def test_the_full_form_in_three_kernels_agrees_with_that_on_cufft(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, backend = matrix(*shape, dtype=dtype), named("cuda")
    assert backend is not None
    traits = backend.traits(x.device)
    assert traits is not None
    for response in (fm.HighPass(0.4), fm.Butterworth(0.1), fm.Official(0.7)):
        found = candidates(response, shape[-2:], dtype, "cuda", "cuda", traits)
        by_cufft, ours = ([p for p in found if p.form == "full" and bool(p.tiles) == own] for own in (False, True))
        results = []
        for plan in (by_cufft[0], ours[0]):
            results.append(x.clone())
            backend.executable(plan).run([results[-1].reshape(-1, *shape[-2:])], 1.5)
        again = x.clone().reshape(-1, *shape[-2:])
        backend.executable(ours[0]).run([again], 1.5)
        assert torch.equal(again, results[1].reshape(again.shape))
        assert float((results[0].double() - results[1].double()).norm() / x.double().norm()) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("response", [fm.HighPass(0.05), fm.HighPass(0.2), fm.Butterworth(0.1)], ids=repr)
def test_memory_is_what_explain_promised(response: Response) -> None:
    x = matrix(2048, 3000)
    fm.filter_(x, response, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fm.filter_(x, response, backend="cuda")
    torch.cuda.synchronize()
    unsplit = 1 << 20  # torch's allocator splits off no less
    assert torch.cuda.max_memory_allocated() - before <= fm.explain(x, response).workspace_bytes + unsplit


@pytest.mark.parametrize("response", [fm.HighPass(0.05), fm.HighPass(0.2), fm.Butterworth(0.1)], ids=repr)
def test_a_captured_graph_replays(response: Response) -> None:
    x = matrix(300, 512)
    want = fm.filtered(x, response, backend="cuda")
    static = x.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fm.filter_(static, response, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fm.filter_(static, response, backend="cuda")
    for height in range(400, 500):  # push other plans through the caches
        fm.filter_(matrix(height, 64), fm.Butterworth(0.1), backend="cuda")
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(static, want)


def test_streams_and_threads_do_not_meet() -> None:
    inputs = [matrix(768, 700 + i, seed=i) for i in range(8)]
    want = [fm.filtered(x, fm.HighPass(0.2), backend="cuda") for x in inputs]
    torch.cuda.synchronize()
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                got = fm.filtered(inputs[i], fm.HighPass(0.2), backend="cuda")
                torch.cuda.current_stream().synchronize()
                if not torch.equal(got, want[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_more_than_two_to_the_31_entries() -> None:
    free, _ = torch.cuda.mem_get_info()
    rows, width = (1 << 31) // 8192 + 8, 8192
    if free < 3 * rows * width * 2:
        pytest.skip(f"needs {3 * rows * width * 2 / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    x.normal_(generator=torch.Generator("cuda").manual_seed(0)).add_(1)
    fm.filter_(x, fm.Center(-1), backend="cuda")
    for row in (0, rows // 2, -1):
        assert abs(float(x[row].float().mean())) < 5e-3  # rounding to bfloat16 leaves up to .0013


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_merge_runs_on_the_gpu_and_returns_to_the_base(device: str) -> None:
    base = {"a.weight": matrix(300, 512, dtype=torch.bfloat16).to(device), "b.bias": matrix(40).to(device)}
    models = [{name: x + 0.01 * (i + 1) for name, x in base.items()} for i in range(3)]
    merged = fm.merge(base, models, backend="cuda")
    on_cpu = [{name: x.cpu() for name, x in state.items()} for state in (base, *models)]
    want = fm.merge(on_cpu[0], on_cpu[1:], backend="torch")
    for name, x in merged.items():
        assert x.device.type == device
        assert torch.allclose(x.cpu().float(), want[name].float(), rtol=8e-3, atol=1e-6)


def test_sums_selection_and_sparse_updates_are_those_of_torch() -> None:
    base, models = matrix(1000, 1001, dtype=torch.bfloat16), [matrix(1000, 1001, seed=i) for i in (1, 2, 3)]
    total, means = task_vector_sum(base, models, [0.2, 0.3, 0.5], backend="cuda")
    expected, expected_means = task_vector_sum(base, models, [0.2, 0.3, 0.5], backend="torch")
    assert torch.equal(total, expected)
    assert means == pytest.approx(expected_means, rel=1e-5)
    rounded = add_round(base, total, 0.7, torch.bfloat16, backend="cuda")
    assert torch.equal(rounded, add_round(base, total, 0.7, torch.bfloat16, backend="torch"))
    for by_row in (False, True):
        got = select_largest(models[0], base, 500, by_row=by_row, backend="cuda")
        want = select_largest(models[0], base, 500, by_row=by_row, backend="torch")
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values)
    weights = base.clone()
    entries = SparseVector(got.indices.cuda(), got.values.cuda())
    with apply_([Update(weights, entries, 0.7)], backend="cuda"):
        assert not torch.equal(weights, base)
    assert torch.equal(weights, base)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three kernels are chosen wherever they can."""
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", "own")
    with registry.using(CudaBackend(), TorchBackend()):
        yield


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (50257, 768)], ids=str)
def test_sum_and_filter_at_once_are_both_one_after_the_other(shape: tuple[int, int]) -> None:
    assert fm.explain(shape, fm.HighPass(0.05), device="cuda", backend="cuda").form == "decimated"
    _sum_and_filter_at_once(shape, fm.HighPass(0.05))


@pytest.mark.parametrize("response", [fm.HighPass(0.05), fm.HighPass(0.4), fm.Butterworth(0.1)], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (1009, 1012)], ids=str)
def test_three_kernels_sum_and_filter_at_once_and_add_the_base(
    own: None, shape: tuple[int, int], response: fm.Response
) -> None:
    assert fm.explain(shape, response, device="cuda", backend="cuda").tiles is not None
    _sum_and_filter_at_once(shape, response)
    _last_pass_adds_the_base(shape, response, torch.bfloat16)


def _sum_and_filter_at_once(shape: tuple[int, int], response: fm.Response) -> None:
    weights = [0.2, -0.1, 0.5, 0.4]
    base, *models = (matrix(*shape, dtype=torch.bfloat16, seed=seed) for seed in range(5))
    want, want_means = task_vector_sum(base, models, weights)
    want_before = norm([want])
    fm.filter_(want, response)
    got, means, norms = finished_sum(base, models, weights, response)
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert means == pytest.approx(want_means, rel=1e-12)
    assert norms == (pytest.approx(want_before, rel=1e-12), pytest.approx(norm([got]), rel=1e-6))
    again, *_ = finished_sum(base, models, weights, response)
    assert torch.equal(again, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "response"), [((4096, 11008), fm.HighPass(0.05)), ((50257, 768), fm.Butterworth(0.1))], ids=str
)
def test_the_last_pass_adds_the_base(shape: tuple[int, int], response: fm.Response, dtype: torch.dtype) -> None:
    _last_pass_adds_the_base(shape, response, dtype)


def _last_pass_adds_the_base(shape: tuple[int, int], response: fm.Response, dtype: torch.dtype) -> None:
    weights = [0.2, -0.1, 0.5, 0.4]
    base, *models = (matrix(*shape, dtype=torch.bfloat16, seed=seed) for seed in range(5))
    want, *_ = finished_sum(base, models, weights, response)
    late, _, norms = filtered_sum(base, models, weights, response)
    assert isinstance(late, LateSum)
    assert norms is not None
    assert norms[1] == pytest.approx(norm([want]), rel=1e-6)
    with torch.cuda.stream(torch.cuda.Stream()):  # nothing that is yet to run is waited for
        got = add_round(base, late, 0.7, dtype, factor=1.1)
        assert torch.equal(got, add_round(base, want, 0.7, dtype, factor=1.1))
    assert torch.equal(late.tensor, want)


def test_tensors_of_files_by_way_of_pinned_memory_give_what_those_on_the_gpu_give(tmp_path: Path) -> None:
    shapes = [(3000, 200), (1280, 512), (77,), (64, 48), (4000, 1000)]
    states = [
        {f"{i}.weight": matrix(*shape, dtype=torch.bfloat16, seed=10 * model + i) for i, shape in enumerate(shapes)}
        for model in range(4)
    ]
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    recipe = fm.Recipe(weights="uniform")
    want = fm.merge(states[0], states[1:], recipe, backend="cuda")
    from_files = fm.merge_checkpoints(files[0], files[1:], tmp_path / "out", recipe, backend="cuda", progress=False)
    got = load_file(from_files.out / "model.safetensors")
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.cpu())


def test_an_expert_of_many_tensors_switches_across_streams_and_in_a_graph() -> None:
    updates = mixed_updates([*TOLERANCE], 130, "cuda")
    before, after = [update.weights.clone() for update in updates], [expected(update).cuda() for update in updates]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        on = apply_(updates, backend="cuda")
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(update.weights, want) for update, want in zip(updates, after, strict=True))
    on.close()
    assert all(torch.equal(update.weights, want) for update, want in zip(updates, before, strict=True))

    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100)).cuda().requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = {name: value + matrix(*value.shape, seed=1) for name, value in state.items()}
    bank = fx.ExpertBank(model, fx.extract_experts(state, {"t": tuned}))
    x = matrix(16, 300)
    with bank.active("t"):  # once before the capture
        want = model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), bank.active("t"):
        got = model(x)
    with bank.active({"t": 0.5}):  # another switch in between
        pass
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
