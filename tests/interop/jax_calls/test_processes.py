"""JAX functions in other processes: those of DataLoader and of DistributedDataParallel."""

import textwrap

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.long

DATASET = """
import jax.numpy as jnp
import torch
import torchleaf


class Squares(torch.utils.data.Dataset):
    square = staticmethod(torchleaf.jax_function(jnp.square))

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.square(torch.tensor(float(i)))
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    (tmp_path / "squares.py").write_text(textwrap.dedent(DATASET))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


def test_workers_that_are_spawned(dataset):
    out = run_python(
        """
        import warnings
        import torch
        from squares import Squares

        if __name__ == "__main__":
            options = dict(batch_size=3, num_workers=2, multiprocessing_context="spawn")
            print([batch.tolist() for batch in torch.utils.data.DataLoader(Squares(), **options)])
        """
    )
    assert out.strip() == "[[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]]"


def test_workers_that_are_forked_are_told(dataset):
    out = run_python(
        """
        import warnings
        import torch
        from squares import Squares

        warnings.simplefilter("ignore")  # JAX's own, of os.fork
        Squares()[0]  # JAX starts
        loader = torch.utils.data.DataLoader(Squares(), batch_size=3, num_workers=1, multiprocessing_context="fork")
        try:
            list(loader)
        except RuntimeError as error:
            print(error)
        """
    )
    assert "square is called in a process that was forked after JAX had started" in out
    assert "multiprocessing_context='spawn'" in out


def test_distributed_data_parallel(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import jax.numpy as jnp
            import torch
            import torchleaf


            class Net(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(3, 2))
                    self.layer = torchleaf.jax_function(lambda x, w: jnp.tanh(x @ w))

                def forward(self, x):
                    return self.layer(x, self.weight)


            def data():
                torch.manual_seed(0)
                return torch.randn(8, 3)


            def work(rank, address, results):
                torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
                net = torch.nn.parallel.DistributedDataParallel(Net())
                net(data()[rank::2]).square().mean().backward()
                torch.save(net.module.weight.grad, f"{results}/{rank}.pt")
                torch.distributed.destroy_process_group()


            if __name__ == "__main__":
                folder = sys.argv[1]
                torch.multiprocessing.spawn(work, (f"file://{folder}/rendezvous", folder), nprocs=2)
                alone = Net()
                alone(data()).square().mean().backward()
                for rank in range(2):
                    torch.testing.assert_close(torch.load(f"{folder}/{rank}.pt"), alone.weight.grad)
                print("equal")
            """
        )
    )
    run = f"runpy.run_path({str(script)!r}, run_name='__main__')"
    out = run_python(f"import runpy, sys; sys.argv = ['ddp', {str(tmp_path)!r}]; {run}")
    assert out.strip().endswith("equal")
