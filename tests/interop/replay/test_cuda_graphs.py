"""Which calls CUDA graphs serve, and that nothing they keep is overwritten: on the CPU, with imitated graphs."""

import threading
import time

import pytest
import torch
from imitated_cuda_graphs import Graph, Stream, imitate
from torchleaf.interop.replay import cuda_graphs
from torchleaf.interop.replay.cuda_graphs import Captured


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The graphs, one for each launch."""
    imitate(monkeypatch)
    launches, launch = [], cuda_graphs._Graph.launch
    monkeypatch.setattr(cuda_graphs._Graph, "launch", lambda self, xs: (launches.append(self), launch(self, xs))[1])
    return launches


def forward(kept, w, x, out):
    product = torch.mm(x, w)
    torch.tanh(product, out=out)
    return [out.clone()]


def backward(kept, w, x, ct, dw):
    (y,) = kept
    kept.clear()
    torch.mm(x.T.contiguous(), ct * (1 - y * y), out=dw)
    return []


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


W = numbers(3, 2)


def right(x):
    return torch.tanh(x @ W)


def run_forward(captured, x):
    out = torch.full((4, 2), float("nan"))
    kept = captured([], W, x, out)
    torch.testing.assert_close(out, right(x))
    return kept, out


def test_each_set_of_addresses_has_a_graph(launches):
    captured = Captured(forward, 2)
    xs, outs = [numbers(4, 3) for _ in range(2)], [torch.empty(4, 2) for _ in range(2)]
    for run in range(10):
        x = xs[run % 2].copy_(numbers(4, 3) * run)
        captured([], W, x, outs[run % 2])
        torch.testing.assert_close(outs[run % 2], right(x))
    assert len(launches) == 6
    assert len(set(launches)) == 2


def test_where_no_set_comes_again_one_graph_serves_all(launches):
    captured = Captured(forward, 2)
    xs = [numbers(4, 3) * run for run in range(30)]
    alive = [run_forward(captured, x)[1] for x in xs]  # so that no address comes again
    assert len(launches) == 30 - cuda_graphs._PATIENCE
    assert len(set(launches)) == 1
    assert alive


def test_what_one_graph_keeps_is_for_one_pair_of_calls(launches):
    forwards, backwards = Captured(forward, 2), Captured(backward, 3)
    alive = []
    for run in range(40):
        pairs = []
        for _ in range(1 + run % 2):  # in every other round two calls are under way
            x = numbers(4, 3) * (run + len(pairs) - 20)
            pairs.append((x, *run_forward(forwards, x)))
        for x, kept, _ in pairs:
            ct, dw = numbers(4, 2) * run, torch.full((3, 2), float("nan"))
            backwards(kept, W, x, ct, dw)
            torch.testing.assert_close(dw, x.T @ (ct * (1 - right(x) ** 2)))
            assert not kept
            alive.append((x, ct, dw, kept))
        alive += pairs
    assert len(launches) > 50


def test_a_weight_that_moves_late_gets_another_graph(launches):
    captured = Captured(forward, 2)
    alive = [run_forward(captured, numbers(4, 3) * run) for run in range(12)]
    moved = W * 2
    for run in range(30):
        x, out = numbers(4, 3) * run, torch.empty(4, 2)
        captured([], moved, x, out)
        torch.testing.assert_close(out, torch.tanh(x @ moved))
        alive.append((x, out))
        moved = moved.clone() if run % 4 == 0 else moved
        alive.append(moved)
    assert len(set(launches)) == 2


def test_large_buffers_are_not_copied(launches, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MOST_COPIED", 4 * 3 * 4)  # the input alone, without the output
    captured = Captured(forward, 2)
    assert [run_forward(captured, numbers(4, 3) * run) for run in range(30)]
    assert not launches


def test_what_cannot_be_captured_runs_op_by_op(launches, monkeypatch):
    def refuse(self, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    captured = Captured(forward, 2)
    x, out = numbers(4, 3), torch.empty(4, 2)
    for _ in range(5):
        captured([], W, x, out)
        torch.testing.assert_close(out, right(x))
    assert not launches


def test_threads_capture_one_after_the_other(monkeypatch):
    """A process may have no more than one capture under way: with two, torch ends it. Nor may streams wait for a
    capturing one, which would draw them into the capture."""
    under_way, most, met = [], [], []

    class Watched(Graph):
        def capture_begin(self, capture_error_mode):
            super().capture_begin(capture_error_mode)
            under_way.append(self)
            most.append(len(under_way))

        def capture_end(self):
            time.sleep(0.02)  # the other threads go on
            under_way.remove(self)
            super().capture_end()

    def wait_stream(self, other):
        time.sleep(0.005)  # another thread may begin
        met.extend(under_way)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Watched)
    monkeypatch.setattr(Stream, "wait_stream", wait_stream)
    together, outs = threading.Barrier(4), [torch.empty(4, 2) for _ in range(4)]

    def work(out):
        captured, x = Captured(forward, 2), numbers(4, 3)
        for _ in range(3):
            together.wait()
            captured([], W, x, out)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    assert not met
    for out in outs:
        torch.testing.assert_close(out, right(numbers(4, 3)))
