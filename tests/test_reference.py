"Values and gradients equal recorded calls of the authors' released modules"
import json, os
from pathlib import Path
import numpy as np, pytest, torch
from diffkd_nb.released import from_released, released_name

FOLDER = Path(os.environ.get('DIFFKD_REFERENCE') or Path(__file__).parent/'reference')
FILES = sorted(FOLDER.glob('*.npz'))


def close(got, want, rel, what, zero=0.):
    "Largest difference relative to the largest value, plus `zero` for what would vanish in exact arithmetic"
    got, want = got.detach().double().flatten(), torch.from_numpy(np.asarray(want)).double().flatten()
    assert got.shape == want.shape and torch.isfinite(got).all(), what
    err, size = (got - want).abs().max().item(), want.abs().max().item()
    assert err <= rel*size + zero, f'{what}: differs by {err:.2e}, size {size:.2e}, allowed {rel:g} relative'


def test_there_is_something_to_compare():
    assert FILES, f'no .npz file in {FOLDER}: set DIFFKD_REFERENCE to a folder of reference vectors'


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_reference(file):
    d = np.load(file)
    meta = json.loads(str(d['meta']))
    module = from_released({k[6:]: torch.from_numpy(d[k]) for k in d.files if k.startswith('state/')}, steps=meta['inference_steps'])
    assert (module.kind == 'feature') == (meta['kernel_size'] == 3) and (module.autoencoder is None) == (meta['latent_channels'] is None)
    module.train(meta['training'])
    student, teacher, noise, diffusion_noise, t = (torch.from_numpy(d[k]) for k in ('student', 'teacher', 'noise', 'diffusion_noise', 'timesteps'))
    student.requires_grad_()
    out = module(student, teacher, noise=noise, diffusion_noise=diffusion_noise, timesteps=t)
    (out.kd_loss + out.diffusion_loss + out.reconstruction_loss).backward()

    for ours, key in [(out.gamma, 'gamma'), (out.denoised, 'denoised'), (out.target, 'latent_teacher'), (out.diffusion_loss, 'diffusion_loss'), (out.kd_loss, 'kd_loss')]:
        close(ours, d[key], 1e-5, key)
    if 'reconstruction_loss' in d.files: close(out.reconstruction_loss, d['reconstruction_loss'], 1e-5, 'reconstruction_loss')
    else: assert out.reconstruction_loss == 0
    close(student.grad, d['grad_student'], 1e-4, 'grad_student')
    params = dict(module.named_parameters())
    grads = {released_name(k[5:]): k for k in d.files if k.startswith('grad/')}
    assert set(grads) == set(params)
    for name, key in grads.items(): close(params[name].grad, d[key], 1e-4, key, zero=1e-6) # biases before BatchNorm have no gradient


def test_the_check_can_fail():
    "A wrong constant in the last digits that are promised is noticed"
    with pytest.raises(AssertionError): close(torch.tensor([1.0001]), np.array([1.]), 1e-5, 'x')
    with pytest.raises(AssertionError): close(torch.tensor([float('nan')]), np.array([1.]), 1e-5, 'x')


def test_an_empty_folder_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'FOLDER', tmp_path); monkeypatch.setitem(globals(), 'FILES', [])
    with pytest.raises(AssertionError, match=f'no .npz file in {tmp_path}'): test_there_is_something_to_compare()
