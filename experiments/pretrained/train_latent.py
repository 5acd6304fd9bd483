"""Train a tiny VAE and a latent DiT on 32x32 RGB images, and save them as a diffusers pipeline.

    python experiments/pretrained/train_latent.py IMAGES.zip FOLDER --minutes 30

Nothing of bayesdiff is used: this stands for a network that somebody else has trained. IMAGES.zip
holds PNG files and ``dataset.json`` with their labels.
"""

import argparse
import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("images", type=Path)
parser.add_argument("folder", type=Path)
parser.add_argument(
    "--minutes", type=float, default=30, help="of processor time, a third for the VAE"
)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
with zipfile.ZipFile(options.images) as file:
    named = json.loads(file.read("dataset.json"))["labels"]
    arrays = [np.array(Image.open(io.BytesIO(file.read(name)))) for name, _ in named]
images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
labels = torch.tensor([label for _, label in named])

vae = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 32),
    latent_channels=4,
    norm_num_groups=8,
    sample_size=32,
)
dit = DiTTransformer2DModel(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    num_layers=6,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=1000,
)


def train(module, share_of_time, batch, lr, loss_of):
    """Adam on ``loss_of(chosen images' numbers)``, averaged weights at the end."""
    average = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    begin, step, loss_sum = time.process_time(), 0, 0.0
    seconds = 60 * options.minutes * share_of_time
    while (share := (time.process_time() - begin) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 200, 4 * (1 - share))
        loss = loss_of(torch.randint(len(images), (batch,)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.step(module.parameters())
        step, loss_sum = step + 1, loss_sum + loss.item()
        if step % 100 == 0:
            print(
                f"{type(module).__name__} step {step}, {share:.0%}, loss {loss_sum / 100:.4f}",
                flush=True,
            )
            loss_sum = 0.0
    average.copy_to(module.parameters())
    return step


def vae_loss(chosen):
    """Squared error of decoded samples, and a little Kullback-Leibler divergence."""
    x = images[chosen]
    with torch.autocast("cpu", torch.bfloat16):
        law = vae.encode(x).latent_dist
        decoded = vae.decode(law.sample()).sample
    return F.mse_loss(decoded.float(), x) + 1e-5 * law.kl().mean() / x[0].numel() * 32


vae_steps = train(vae, 1 / 3, 32, 2e-3, vae_loss)
with torch.no_grad():
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])
    error = float(F.mse_loss(vae.decode(latents[:500]).sample, images[:500]))
vae.register_to_config(scaling_factor=float(1 / latents.std()))
latents = latents * vae.config.scaling_factor
noising = DDPMScheduler(beta_schedule="linear", clip_sample=False)


def dit_loss(chosen):
    """Squared error of the noise, a tenth of the classes hidden."""
    x, y = latents[chosen], labels[chosen]
    y = torch.where(torch.rand(len(y)) < 0.1, 1000, y)  # "no class" of diffusers' DiT
    noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
    with torch.autocast("cpu", torch.bfloat16):
        said = dit(noising.add_noise(x, noise, t), t, class_labels=y).sample
    return F.mse_loss(said.float(), noise)


dit_steps = train(dit, 2 / 3, 128, 1e-3, dit_loss)
scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
names = {number: str(number) for number in range(10)}
DiTPipeline(dit.eval(), vae.eval(), scheduler, names).save_pretrained(options.folder)
record = {
    "vae_steps": vae_steps,
    "vae_error": error,
    "dit_steps": dit_steps,
    "cpu_minutes": options.minutes,
}
(options.folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
