"""How much of a map's size is chance of the weight draws: exact first-order maps of eight images.

    python experiments/pretrained/draws.py VALIDATION.json [KEY=VALUE ...]

VALIDATION is the file ``validation-*.json`` of a run whose reference has 64 members of seed 1;
KEY=VALUE are that run's options. Writes ``trained.draws.*`` into results.json: what M draws give
over all directions, and the members' variance over what first order makes of the same draws.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.runs.setup import Setup
from bayesdiff.uncertainty.sensitivities.linearised import directions, follow
from bayesdiff.uncertainty.sensitivities.products import differences

HERE = Path(__file__).parent
IMAGES, SEEDS = 8, 200


def main():
    """Follow every direction once; all else is linear algebra."""
    validation, *words = sys.argv[1:]
    run, solver, estimator, laplace = pipeline.prepare(pipeline.compose(*words))
    run.model.to(run.device).eval()
    posterior = laplace.fit(run.model, run.data.data)
    starts = Setup(run, solver, estimator, posterior, "", {}).starts
    columns = posterior.columns()
    with torch.no_grad():
        parts = [
            follow(starts(range(IMAGES)), part, 1.0, differences).sensitivities
            for part in columns.split(64)
        ]
    moved = torch.cat(parts).flatten(2).double()  # (P, B, pixels)
    exact = moved.square().sum((0, 2))
    shares = torch.stack([torch.linalg.eigvalsh(own @ own.T) for own in moved.unbind(1)])
    shares = shares / exact[:, None]

    def size(z: Tensor, members: bool) -> Tensor:
        """Sums over those of all directions: about the members' mean, or the trained weights."""
        drawn = torch.einsum("mp,pbx->mbx", z, moved)
        return (drawn.var(0) if members else drawn.square().mean(0)).sum(1) / exact

    def coordinates(count: int, seed: int) -> Tensor:
        """Draws as combinations of the columns."""
        drawn, basis = directions(posterior, count, seed).flatten(1), columns.flatten(1)
        return torch.linalg.lstsq(basis.T, drawn.T).solution.T

    def spread(count: int, members: bool) -> float:
        """The sd, over seeds, of the median size."""
        random = torch.Generator().manual_seed(0)
        shape = (count, len(columns))
        drawn = [
            size(torch.randn(shape, generator=random, dtype=torch.float64), members).median()
            for _ in range(SEEDS)
        ]
        return float(torch.stack(drawn).std())

    seen = torch.tensor(json.loads(Path(validation).read_text())["images"]["reference"])[:IMAGES]
    reference = size(coordinates(64, 1), True)
    same = seen / (reference * exact)
    results = {
        "images": IMAGES,
        "largest_direction": float(shares.amax(1).median()),
        "effective_directions": float((1 / shares.square().sum(1)).median()),
        "reference": float(reference.median()),
        "linearised32": float(size(coordinates(32, 0), False).median()),
        "ensemble64": float(size(coordinates(64, 0), True).median()),
        "sd_of_32": spread(32, False),
        "sd_of_64": spread(64, True),
        "sd_of_256": spread(256, True),
        "members_over_first_order": [float(v) for v in same.sort().values],
    }
    path = HERE / "results.json"
    kept = json.loads(path.read_text())
    kept |= {f"trained.draws.{name}": value for name, value in results.items()}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
