"""Arrays as a data set: in memory, mapped from disk, and what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from own_sources import digits_with_angles

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.arrays import array_images
from bayesdiff.data.module import ImageDataModule
from bayesdiff.runs.build import build


@pytest.fixture(scope="module")
def arrays():
    data = digits_with_angles()
    return {
        "images": data.images.numpy(),
        "labels": data.labels.numpy(),
        "classes": np.array(data.classes),
        "embeddings": data.embeddings.numpy(),
        "test_images": data.test_images.numpy(),
        "test_labels": data.test_labels.numpy(),
        "test_embeddings": data.test_embeddings.numpy(),
    }


@pytest.fixture(scope="module")
def saved(arrays, tmp_path_factory):
    """A folder with everything as ``all.npz``, and as files of a folder ``parts``."""
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "all.npz", **arrays)
    (folder / "parts").mkdir()
    for name, array in arrays.items():
        np.save(folder / "parts" / f"{name}.npy", array)
    return folder


def batches(data, epoch):
    trainer = SimpleNamespace(
        world_size=1, global_rank=0, overfit_batches=0.0, current_epoch=epoch,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    ready = SimpleNamespace(current=SimpleNamespace(ready=0))
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready))
    module = ImageDataModule(data, batch_size=64, flip=True, seed=3)
    module.trainer = trainer
    return [*module.train_dataloader(), *module.val_dataloader()]


def test_mapped_images_make_the_same_batches_as_images_in_memory(saved):
    whole = array_images("a", saved / "all.npz")
    mapped = array_images("a", saved / "parts", mapped=True)
    assert mapped.fingerprint == whole.fingerprint == digits_with_angles().fingerprint
    assert whole.classes == mapped.classes == tuple("0123456789")
    for epoch in (0, 1):
        for one, other in zip(batches(whole, epoch), batches(mapped, epoch), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_run_on_mapped_images_is_the_run_on_images_in_memory(saved, compose):
    roots = (f"data.root={saved / 'all.npz'}",), (
        f"data.root={saved / 'parts'}", "data.source.mapped=true",
    )  # fmt: skip
    metrics = []
    for number, options in enumerate(roots):
        cfg = compose("data=array", *options)
        cfg.run_dir = f"{cfg.output_dir}/{number}"
        metrics.append(pipeline.run(cfg).metrics)
    assert metrics[0] == metrics[1]
    assert any(name.startswith("fid@12") for name in metrics[0])


def test_images_alone(tmp_path, arrays):
    np.save(tmp_path / "a.npy", arrays["images"][:20, 0])
    data = array_images("a", tmp_path / "a.npy", test_fraction=0.25)
    assert data.images.shape == (15, 1, 8, 8) and len(data.test_images) == 5
    assert data.labels is None and data.classes == ()
    both = torch.cat([data.images, data.test_images]).flatten(1).long()
    truth = torch.from_numpy(arrays["images"][:20]).flatten(1).long()
    assert sorted(both.tolist()) == sorted(truth.tolist())


def test_vectors_of_arrays_condition_a_model(saved, compose):
    run = build(compose("data=array", f"data.root={saved / 'all.npz'}", "condition=embedding"))
    assert run.model.condition.size == 2 and run.data.given == "embeddings"


def pickled(folder, arrays):
    np.save(folder / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return folder


def files(**changed):
    def write(folder, arrays):
        for name, array in {**arrays, **changed}.items():
            if array is not None:
                np.save(folder / f"{name}.npy", array)
        return folder

    return write


def zipped(folder, arrays):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def damaged(folder, arrays):
    (folder / "images.npy").write_bytes(b"\x93NUMPY and no more")
    return folder


FLOATS = np.zeros((4, 8, 8), np.float32)
REFUSED = {
    "objects": (pickled, {}, "cannot read .*images.npy"),
    "damaged": (damaged, {}, "cannot read .*images.npy"),
    "nothing": (lambda folder, arrays: folder, {}, "has no array named images"),
    "missing": (lambda folder, arrays: folder / "no.npz", {}, "does not exist"),
    "unset": (lambda folder, arrays: None, {}, "data.root is not set"),
    "a zip": (zipped, {"mapped": True}, "cannot be mapped"),
    "no test": (files(test_images=None), {"mapped": True}, "needs .*test_images.npy"),
    "floats": (files(images=FLOATS), {}, "torch.float32; give uint8"),
    "labels": (files(labels=FLOATS), {}, "give whole numbers"),
    "too few": (files(labels=np.arange(10), test_images=None), {}, "give as many"),
    "half": (files(test_embeddings=None), {}, "only one of embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_do_not_fit_are_refused(case, arrays, tmp_path):
    write, options, fragment = REFUSED[case]
    with pytest.raises(UserError, match=fragment):
        array_images("a", write(tmp_path, arrays), **options)


BOUNDED = """
import resource, sys, numpy as np, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bayesdiff.data.arrays import array_images
from bayesdiff.laplace.curvature import fit_curvature
from hand import model_of
from bayesdiff.networks import UNet
torch.set_num_threads(1)
# What is there already, and 96 MB: no other memory of its own may this process have.
held = 1024 * int(next(
    line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")
))
resource.setrlimit(resource.RLIMIT_DATA, (held + 96 * 2**20,) * 2)
try:
    np.ones(256 * 2**20, np.uint8)
    sys.exit("the bound does not hold")
except MemoryError:
    pass
data = array_images("big", Path(sys.argv[1]), mapped=True)
model = model_of(UNet(1, 32, channels=(4, 8), blocks=1))
found = fit_curvature(model, data.images, None, source="t", num_images=500, batch_size=50)
print(len(data.images), found.num_images)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's own memory")
def test_a_set_of_four_times_the_memory_allowed(tmp_path):
    """384 MB of images, sparse on disk, in a process that may take 96 MB more than it has."""
    for name, count in (("images", 384 * 1024), ("test_images", 64)):
        shape = (count, 1, 32, 32)
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path), str(__file__).rpartition("/")[0]],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["393216", "500"]
