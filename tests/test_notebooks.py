"Every notebook runs from top to bottom, each in a process of its own"
import os, sys
from pathlib import Path
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
import workers

ROOT = Path(__file__).resolve().parent.parent
CONFIG = get_config(ROOT)
NOTEBOOKS = sorted(nbglob(CONFIG.nbs_path, as_path=True))
FLAGS = os.environ.get('NB_FLAGS', '').split()      # cells to run that are normally left out, such as slow


# Pages whose parts are tested elsewhere; `nbdev-test` runs them as well
LONG = ('12_models', '18_diagnostics', '19_plots', '21_fast', '24_run', '24a_shared_teacher', '26_grid', '26a_equal_time', '27_comparison',
        '28_verify', '30_commands', '31_demo', '33_distill', '40_quickstart', '40a_resnet50_teaches_resnet18', '42_plain_loop',
        '43_inside', '44_choose_taps', '44d_your_teacher', '44a_segmentation_tutorial', '44b_detection_tutorial', '44c_text_tutorial',
        '44e_your_own_method', '47_which_method', '57_open_questions_plan', '61_imagenet_baseline', '62_imagenet_stronger',
        '63_ablations', '15b_segmentation', '16a_text', '16b_detection_models', '16c_detection', '22_distributed', '29_tables', '32_study')
# Pages that show what is stored; `test_numbers` and `58_what_we_found` read the same
STORED = ('51_denoiser_study', '52a_convolutional_student', '52d_sentiment', '53a_segmentation_study', '54a_detection_study',
          '55_noisy_feature', '55a_capacity_gap', '56_learnt_denoiser', '56a_forms_on_sentences', '56b_methods_on_sentences',
          '57b_rounding', '60_cifar100', '64_visualizations', '65_segmentation_table', '66_detection_tables')
SLOW = {*LONG, *STORED}


def run(path):
    "What `nbdev-test` does with one notebook, from a fixed seed"
    from fastai.torch_core import set_seed
    from nbdev.test import test_nb
    set_seed(0)
    passed, _ = test_nb(path, skip_flags=CONFIG.tst_flags.split(), force_flags=FLAGS, basepath=ROOT)
    return 0 if passed else 'A cell failed.'


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 20 and SLOW <= {p.stem for p in NOTEBOOKS}


@pytest.mark.parametrize('path', [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in NOTEBOOKS], ids=lambda p: p.stem)
def test_notebook(path):
    done = workers.call(run, path, timeout=1800, cwd=CONFIG.nbs_path, join=True)
    assert done.returncode == 0, done.stdout[-6000:]
