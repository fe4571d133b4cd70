"Detection from files to a verified comparison: one line on many detectors, rivals, killed and resumed; what the paper's group says; wrong input"
import copy, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from PIL import Image
from fastai.vision.all import Callback, Learner, set_seed
from pairs import CountCalls, n_hooks, quiet, same, snapshot
from resuming import cut_and_resumed
pytest.importorskip('pycocotools'); pytest.importorskip('torchmetrics'); pytest.importorskip('faster_coco_eval')
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.comparison import compare
from diffkd_nb.denoisers import UNetDenoiser
from diffkd_nb.detection import DetectionCallback, MeanAP, Watch, detection_learner, new_precision, packed, read_precision
from diffkd_nb.detection_data import check_boxes, draw_objects, open_detection, picture, unpacked, write_objects
from diffkd_nb.detection_models import detection_model
from diffkd_nb.distillation import Distillation, ask_detector, boxes_of
from diffkd_nb.files import InputError
from diffkd_nb.models import registered_only
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import run
from diffkd_nb.records import eval_mode
from diffkd_nb.detectors import check_pictures
from diffkd_nb.taps import plan_taps
from diffkd_nb.tables import beside_paper, run_table, table_cost
from diffkd_nb.tasks import open_data, task_of
from diffkd_nb.verify import verify
from diffkd_nb.weights import save_weights

RECIPE = get_recipe('bccd').replace(epochs=3, batch_size=6, augmentation=('flip',))
def small(family, encoder, width): # FCOS has no anchors of several sides
    return f"detector:{family}?encoder=small:{encoder}&width={width}&min_size=64{'' if family == 'fcos' else '&anchor=16'}"
TEACHER, STUDENT = small('retinanet', 4, 16), small('retinanet', 2, 8)
FULL = ['fpn.0', 'fpn.1', 'fpn.2', 'fpn.p6', 'fpn.p7']


@pytest.fixture(scope='module')
def data(tmp_path_factory): return write_objects(tmp_path_factory.mktemp('objects'), (18, 6), (72, 96))


@pytest.fixture(scope='module')
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    m = run(RECIPE, data, None, TEACHER, 'alone', 0, out, progress=False)
    assert m['settings']['task'] == 'detection' and m['data']['class_names'] == ['disc', 'square']
    return f"{TEACHER}@{out/'student.safetensors'}"


def models(student, teacher, n=3):
    set_seed(0)
    return detection_model(student, n), detection_model(teacher, n)


def fit(learn, n=1, lr=1e-3):
    with quiet(learn): learn.fit(n, lr)
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))


# ---- one line

def check_one_line(student, teacher, data, cb=DiffKDCallback, taps=FULL, bs=2, **kw):
    "The teacher's backbone runs once a batch and nothing of it changes; the student is clean afterwards and loads without this package"
    student, teacher = models(student, teacher)
    seen, keys = snapshot(teacher), list(student.state_dict())
    calls = CountCalls(teacher.backbone)
    learn = detection_learner(open_data(data).dls(bs, ()), student, cb(teacher, verbose=False, **kw))
    learn.dls.train.n = 2*bs; learn.dls.train.dataset.pictures = learn.dls.train.dataset.pictures[:2*bs]
    with quiet(learn): learn.validate()
    assert calls.n == 0
    row, plan = fit(learn), calls
    d = learn.cbs[-1] if isinstance(learn.cbs[-1], DistillCallback) else next(c for c in learn.cbs if isinstance(c, DistillCallback))
    assert [t.name for t in d.plan] == taps
    calls.handle.remove()
    same(seen, snapshot(teacher))
    assert list(student.state_dict()) == keys and n_hooks(student) == n_hooks(teacher) == 0
    assert all(np.isfinite(v) for k,v in row.items() if k in ('train_loss', 'valid_loss', 'kd', *d.distiller.loss_names) and v is not None)
    return learn, row


def test_one_line_on_small_detectors(data):
    learn, row = check_one_line(STUDENT, TEACHER, data)
    assert row['kd'] > 0 and row['diffusion'] > 0 and 0 <= row['map'] <= 1


def test_the_teacher_is_asked_once_a_batch_and_no_further_than_its_pyramid(data):
    student, teacher = models(STUDENT, TEACHER)
    learn = detection_learner(open_data(data).dls(6, ()), student, DiffKDCallback(teacher, verbose=False))
    fit(learn)
    backbone, head, whole = CountCalls(teacher.backbone), CountCalls(teacher.head), CountCalls(teacher)
    fit(learn)
    assert (backbone.n, head.n, whole.n) == (len(learn.dls.train), 0, 0)
    learn.validate(); learn.get_preds()
    assert backbone.n == len(learn.dls.train)


@pytest.mark.parametrize('student,teacher,taps', [
    (small('fcos', 2, 32), small('fcos', 4, 32), FULL),
    pytest.param(small('fasterrcnn', 2, 8), small('retinanet', 4, 16), ['fpn.1', 'fpn.2', 'fpn.3', 'fpn.pool'], marks=pytest.mark.slow)])
def test_families_meet_where_levels_have_the_same_size(student, teacher, taps, data): check_one_line(student, teacher, data, taps=taps)


TV = 'torchvision:{}_fpn?min_size=64'
@pytest.mark.slow
@pytest.mark.parametrize('student,teacher', [
    ('retinanet_resnet18', 'retinanet_resnet34'), ('fcos_resnet18', 'fcos_resnet50'), ('fasterrcnn_resnet18', 'fasterrcnn_resnet50'),
    ('fasterrcnn_mobilenet_v3_large', 'fasterrcnn_mobilenet_v3_large'), ('retinanet_resnet50', 'retinanet_resnet101'), ('fcos_mobilenet_v2', 'fcos_resnet18')])
def test_torchvisions_detectors(student, teacher, data):
    taps = {'fasterrcnn_mobilenet_v3_large': ['fpn.0', 'fpn.1', 'fpn.pool'], 'fasterrcnn_resnet18': ['fpn.0', 'fpn.1', 'fpn.2', 'fpn.3', 'fpn.pool'],
            'fcos_mobilenet_v2': None}.get(student, FULL)
    s, t = models(TV.format(student), TV.format(teacher))
    if taps is None:
        images, targets = [torch.rand(3, 72, 96) for _ in range(2)], [dict(boxes=torch.tensor([[4., 4, 30, 40]]), labels=torch.tensor([1]))]*2
        taps = [p.name for p in plan_taps(s, t, images, targets, taps=['fpn'])]
        assert len(taps) >= 2
    check_one_line(TV.format(student), TV.format(teacher), data, taps=taps)


RIVALS = {'fgd': {}, 'pkd': {}, 'cwd': {}, 'fitnet': {}, 'fitnet_boxes': {}, 'heads': dict(taps=['head.classes', 'head.boxes']),
          'frs': dict(taps=[*FULL, 'head.classes', 'head.boxes']), 'diffkd+heads': dict(taps=[*FULL, 'head.classes', 'head.boxes'])}


@pytest.mark.parametrize('method', [m if m in ('fgd', 'pkd', 'frs') else pytest.param(m, marks=pytest.mark.slow) for m in RIVALS])
def test_rivals(method, data):
    named = lambda teacher, **kw: DistillCallback(teacher, method, **kw)
    learn, row = check_one_line(STUDENT, TEACHER, data, named, **{'taps': FULL, **RIVALS[method]})
    d = next(c for c in learn.cbs if isinstance(c, DistillCallback)).distiller
    assert any(row[n] > 0 for n in d.loss_names)


@pytest.mark.slow
def test_dense_heads_of_fcos_have_centres(data):
    names = ['head.classes', 'head.boxes', 'head.centres']
    _, row = check_one_line(small('fcos', 2, 32), small('fcos', 4, 32), data, lambda t, **kw: DistillCallback(t, 'heads', **kw), taps=names)
    assert row['centres'] > 0


@pytest.mark.slow
def test_both_box_heads_are_asked_about_the_students_proposals(data, batch):
    two = small('fasterrcnn', 2, 8), small('fasterrcnn', 4, 16)
    taps = [f'fpn.{k}' for k in ('0', '1', '2', '3', 'pool')] + ['roi.classes', 'roi.boxes']
    check_one_line(*two, data, lambda t, **kw: DistillCallback(t, 'diffkd+rois', **kw), taps=taps)
    student, teacher = models(*two)
    with Distillation(student, teacher, 'rois', batch) as kd:
        drawn = []
        h = student.roi_heads.box_roi_pool.register_forward_pre_hook(lambda m, a: drawn.extend(a[1]))
        student(*batch); h.remove()
        calls = CountCalls(teacher.rpn); step = kd(batch); step.total.backward()
    with torch.no_grad(), eval_mode(teacher):
        x = teacher.transform(list(batch[0]))[0]
        scores, offsets = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(teacher.roi_heads.box_roi_pool(teacher.backbone(x.tensors), drawn, x.image_sizes)))
    torch.testing.assert_close(step.teacher['roi.classes'][..., 0, 0], scores); torch.testing.assert_close(step.teacher['roi.boxes'][..., 0, 0], offsets)
    assert calls.n == 0 and student.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="box heads of two two-stage detectors .*, and the teacher has none"): Distillation(student, models(STUDENT, TEACHER)[1], 'rois', batch)


# ---- what is compared

@pytest.fixture(scope='module')
def batch(data):
    images, targets, _ = open_data(data).dls(4, ()).valid.one_batch()
    return images, targets


def test_a_plain_loop(batch):
    "The maps are those of the backbones, level by level; the method's gradient reaches the student"
    student, teacher = models(STUDENT, TEACHER)
    with Distillation(student, teacher, 'fitnet', batch) as kd:
        losses = student(*batch); step = kd(batch)
        (sum(losses.values()) + step.total).backward()
    with torch.no_grad(), eval_mode(teacher): want = teacher.backbone(teacher.transform(list(batch[0]))[0].tensors)
    for k,m in want.items(): torch.testing.assert_close(step.teacher[f'fpn.{k}'], m)
    assert all(p.grad is not None for p in student.backbone.parameters())


def test_true_boxes_on_the_padded_picture(batch):
    "By hand: 72 x 96 becomes 64 x 85, padded to 64 x 96"
    student, _ = models(STUDENT, TEACHER)
    state = torch.get_rng_state()
    found = boxes_of(student, batch)
    want = batch[1][0]['boxes']*torch.tensor([85/96/96, 1/72, 85/96/96, 1/72])
    torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, torch.get_rng_state())


def test_shared_and_own_denoisers(batch):
    student, teacher = models(STUDENT, TEACHER)
    own, shared = (Distillation(student, teacher, 'diffkd', batch, levels=how).distiller for how in ('own', 'shared'))
    n = lambda d: sum(p.numel() for p in d.parameters())
    assert n(own) == 5*n(shared) and len(own.taps) == len(shared.taps) == 5 and len({id(t) for t in shared.taps}) == 1
    assert [v == 'shared' for v in shared.columns()['added parameters']] == [False] + [True]*4
    with pytest.raises(ValueError, match="levels must be 'own' or 'shared'"): Distillation(student, teacher, 'diffkd', batch, levels='both')
    with Distillation(student, teacher, 'diffkd', batch, levels='shared') as kd:
        student(*batch); kd(batch).total.backward()
    assert all(p.grad is not None for p in kd.distiller.parameters())


@pytest.mark.parametrize('denoiser', ['unet', lambda c: UNetDenoiser(c, width=8)])
def test_a_unet_denoises(denoiser, batch):
    student, teacher = models(STUDENT, TEACHER)
    with Distillation(student, teacher, 'diffkd', batch, denoiser=denoiser) as kd:
        student(*batch); step = kd(batch); step.total.backward()
    assert isinstance(kd.distiller.taps[0].denoiser, UNetDenoiser) and torch.isfinite(step.total)


def test_pictures_must_be_of_one_size(batch):
    student, teacher = models(STUDENT, TEACHER.replace('min_size=64', 'min_size=96'))
    with pytest.raises(ValueError, match=r'see pictures at different sizes \(transform: min_size \(64,\) and \(96,\), max_size'): Distillation(student, teacher, xb=batch)
    student.transform.min_size = (48, 64)
    with pytest.raises(ValueError, match='draws min_size from'): check_pictures(student, teacher)


def test_what_is_no_detector_is_told(batch):
    student, teacher = models(STUDENT, TEACHER)
    with pytest.raises(ValueError, match='2 class|anchors x values'):
        Distillation(student, detection_model(TEACHER, 5), 'heads', batch)
    a, b = models(small('fasterrcnn', 2, 8), small('fasterrcnn', 4, 8))
    with pytest.raises(ValueError, match="one-stage detectors .*the student has none like it: use taps="): Distillation(a, b, 'heads', batch)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match='no module of the student gives a dict of maps'): plan_taps(plain, copy.deepcopy(plain), torch.randn(2, 3, 8, 8), taps=['fpn'])


def test_fields_by_name(batch):
    student, teacher = models(STUDENT, TEACHER)
    plan = plan_taps(student, teacher, *batch, taps=[('backbone[p6]', 'backbone[2]', 'feature')])
    assert [(p.student.title, p.teacher.title) for p in plan] == [('backbone[p6]', 'backbone[2]')]
    with pytest.raises(ValueError, match="gives no tensor called 'p9'"): plan_taps(student, teacher, *batch, taps=[('backbone[p9]', 'backbone[2]', 'feature')])


@pytest.mark.slow
def test_frozen_normalisation_stays_and_encoders_begin_from_a_file(data, tmp_path):
    plain = detection_model(STUDENT, 3); f = tmp_path/'encoder.safetensors'
    with torch.no_grad():
        for m in plain.backbone.body.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.1, .1); m.running_var.uniform_(.9, 1.1)
    save_weights(plain.backbone.body, f)
    student, teacher = models(f'{STUDENT}&norm=frozen&weights={f}', TEACHER)
    frozen = {n: m for n,m in student.backbone.body.named_modules() if type(m).__name__ == 'FrozenBatchNorm2d'}
    assert len(frozen) == 10 and not any(isinstance(m, nn.BatchNorm2d) for m in student.backbone.body.modules())
    begin = {k: v.clone() for k,v in student.state_dict().items()}
    assert torch.equal(begin['backbone.body.stages.0.0.1.running_mean'], plain.backbone.body.stages[0][0][1].running_mean)
    fit(detection_learner(open_data(data).dls(6, ()), student, DiffKDCallback(teacher, verbose=False)))
    for n,m in frozen.items():
        for k,v in m.state_dict().items(): assert torch.equal(v, begin[f'backbone.body.{n}.{k}'])
    with registered_only(): detection_model(f'{STUDENT}&weights=/nowhere', 3)       # the place for weights that follow, as in verify
    with pytest.raises(InputError, match='norm must be frozen or batch'): detection_model(f'{STUDENT}&norm=group', 3)


# ---- average precision

def noisy(rng, boxes, labels):
    "Some boxes moved, some missed, some false"
    keep = rng.rand(len(boxes)) < .8
    b, k = boxes[keep] + rng.randn(keep.sum(), 4)*3, labels[keep]
    f = rng.rand(3, 4)*40; f[:, 2:] += f[:, :2] + 5
    b, k = np.concatenate([b, f]), np.concatenate([k, rng.randint(1, 3, 3)])
    return dict(boxes=torch.tensor(b, dtype=torch.float32), labels=torch.tensor(k), scores=torch.tensor(rng.permutation(len(b))/len(b), dtype=torch.float32))


@pytest.mark.parametrize('crowds', [False, True])
def test_average_precision_is_that_of_pycocotools(data, crowds):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    rng, found = np.random.RandomState(0), open_data(data).pictures[0]
    metric, images, truth, said = new_precision(), [], [], []
    for i,p in enumerate(found):
        p = p._replace(boxes=p.boxes + np.array([0, 0, .3, .3], np.float32))      # no box of exactly 32 x 32, which is small and medium
        pred, crowd = noisy(rng, p.boxes, p.labels), np.zeros(len(p.labels), int)
        if crowds: crowd[0] = i % 3 == 0
        area = (p.boxes[:, 2:] - p.boxes[:, :2]).prod(1)
        metric.update([pred], [dict(boxes=torch.tensor(p.boxes), labels=torch.tensor(p.labels), iscrowd=torch.tensor(crowd), area=torch.tensor(area))])
        images.append(dict(id=i, height=72, width=96))
        wh = lambda b: [float(v) for v in (b[0], b[1], b[2] - b[0], b[3] - b[1])]
        truth += [dict(id=len(truth) + j + 1, image_id=i, category_id=int(k), bbox=wh(b), area=float(a), iscrowd=int(c))
                  for j,(b,k,a,c) in enumerate(zip(p.boxes, p.labels, area, crowd))]
        said += [dict(image_id=i, category_id=int(k), bbox=wh(b), score=float(s)) for b,k,s in zip(pred['boxes'], pred['labels'], pred['scores'])]
    gt = COCO(); gt.dataset = dict(images=images, annotations=truth, categories=[dict(id=1, name='disc'), dict(id=2, name='square')]); gt.createIndex()
    e = COCOeval(gt, gt.loadRes(said), 'bbox'); e.evaluate(); e.accumulate(); e.summarize()
    ours = read_precision(metric, ['disc', 'square'])
    want = dict(zip(('map', 'map50', 'map75', 'map_small', 'map_medium', 'map_large'), e.stats))
    for k,v in want.items(): assert np.isnan(ours[k]) if v < 0 else abs(ours[k] - v) < 1e-6, (k, ours[k], v)
    each = e.eval['precision'][:, :, :, 0, 2]
    for i,name in enumerate(('disc', 'square')): assert abs(ours[f'ap_{name}'] - each[:, :, i][each[:, :, i] > -1].mean()) < 1e-6


def test_perfect_boxes_have_precision_one(data):
    opened, metric = open_data(data), new_precision()
    for p in opened.pictures[1]:
        b, k = torch.tensor(p.boxes), torch.tensor(p.labels)
        metric.update([dict(boxes=b, labels=k, scores=torch.ones(len(k)))], [dict(boxes=b, labels=k)])
    assert read_precision(metric)['map'] == pytest.approx(1, abs=1e-6)


def test_predictions_of_a_learner(data):
    opened = open_data(data)
    student, _ = models(STUDENT, TEACHER)
    learn = detection_learner(opened.dls(4, ()), student)
    fit(learn)
    preds, index = learn.get_preds()
    assert index.tolist() == list(range(6)) and preds.shape[0] == 6
    student.eval()
    with torch.no_grad(): want = student([learn.dls.valid_ds[2][0].float()/255])[0]
    for k,v in unpacked(preds[2]).items(): torch.testing.assert_close(v, want[k], rtol=1e-4, atol=1e-4)
    f = opened.pictures[1][2].file
    for item in (f, str(f), Image.open(f), np.array(Image.open(f))):
        torch.testing.assert_close(learn.predict(item)[0]['boxes'], want['boxes'], rtol=1e-4, atol=1e-4)
    learn.show_results(max_n=2)


def test_a_plain_learner_learns_by_itself(data):
    "Loss from the data; the validation loss needs the callback, and says so by NaN"
    dls = open_data(data).dls(6, ())
    student, teacher = models(STUDENT, TEACHER)
    learn = Learner(dls, student, metrics=MeanAP(['disc', 'square']), cbs=DiffKDCallback(teacher, verbose=False))
    row = fit(learn)
    assert np.isnan(row['valid_loss']) and 0 <= row['map'] <= 1 and row['kd'] > 0
    learn.add_cb(DetectionCallback())
    assert np.isfinite(fit(learn)['valid_loss'])


@pytest.mark.slow
def test_the_student_loads_without_the_package(data, tmp_path):
    "Boxes of a distilled student of torchvision, in a process that cannot import diffkd_nb"
    learn, _ = check_one_line('torchvision:fasterrcnn_resnet18_fpn?min_size=64', 'torchvision:fasterrcnn_resnet18_fpn?min_size=64', data,
                              taps=['fpn.0', 'fpn.1', 'fpn.2', 'fpn.3', 'fpn.pool'])
    x = torch.rand(3, 72, 96); learn.model.eval()
    with torch.no_grad(): want = learn.model([x])[0]
    torch.save((learn.model, x, want), tmp_path/'student.pt')
    code = ("import sys, torch; sys.modules['diffkd_nb'] = None; m, x, want = torch.load(sys.argv[1], weights_only=False)\n"
            "with torch.no_grad(): got = m.eval()([x])[0]\n"
            "assert all(torch.equal(got[k], want[k]) for k in want)")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'student.pt')], check=True, cwd=tmp_path)


# ---- runs

def test_the_log_has_precision_by_class(data, teacher):
    log = pd.read_csv(f"{teacher.partition('@')[2].rpartition('/')[0]}/log.csv")
    assert {'map', 'map50', 'map75', 'map_small', 'ap_disc', 'ap_square', 'valid_loss'} <= set(log) and log.train_loss.iloc[-1] < log.train_loss.iloc[0]
    assert np.isfinite(log.valid_loss).all()


@pytest.mark.slow
@pytest.mark.parametrize('method', ['diffkd:kd_weight=5,diffusion_weight=5', 'fgd', 'diffkd+heads'])
def test_killed_and_resumed(method, data, teacher, tmp_path, monkeypatch):
    whole, _ = cut_and_resumed(lambda out: run(RECIPE, data, teacher, STUDENT, method, 1, out, progress=False), tmp_path, monkeypatch)
    assert [t['student'] for t in whole['taps']][:5] == [f'backbone[{k}]' for k in ('0', '1', '2', 'p6', 'p7')]
    assert verify(tmp_path/'whole', data=data, teacher=teacher.partition('@')[2])


@pytest.mark.slow
def test_workers_give_the_same_student(data, tmp_path):
    a, b = (run(RECIPE.replace(epochs=1), data, None, STUDENT, 'alone', 0, tmp_path/str(n), num_workers=n, progress=False) for n in (0, 2))
    assert a['student_hash'] == b['student_hash'] and a['result'] == b['result']


def test_the_cache_refuses_pictures_with_boxes(data, teacher, tmp_path):
    with pytest.raises(InputError, match='needs a loader that numbers its views'):
        run(RECIPE, data, teacher, STUDENT, 'diffkd', 0, tmp_path/'r', cache=tmp_path/'c', progress=False)


@pytest.mark.slow
@pytest.mark.parametrize('family,width', [('fcos', 32), ('fasterrcnn', 8)])
def test_other_families_resume_and_verify(family, width, data, tmp_path, monkeypatch):
    "Faster R-CNN draws proposals: its random numbers resume too"
    set_seed(0); out = tmp_path/'teacher'
    run(RECIPE.replace(epochs=1), data, None, small(family, 4, width), 'alone', 0, out, progress=False)
    t = f"{small(family, 4, width)}@{out/'student.safetensors'}"
    cut_and_resumed(lambda o: run(RECIPE, data, t, small(family, 2, width), 'diffkd', 1, o, progress=False), tmp_path, monkeypatch)
    assert verify(tmp_path/'whole', data=data)


def test_compares_and_verifies(data, teacher, tmp_path):
    c = compare([(teacher, STUDENT)], ['alone', 'pkd'], 1, RECIPE.replace(epochs=1), data, tmp_path, executor='here', threads=1, progress=False)
    assert not c.failed and c.task.name == 'detection' and list(c.table().n) == [1, 1] and 'map' in c.markdown()
    report = verify(tmp_path, data=data, teacher=teacher.partition('@')[2])
    assert report and 'the student gives the map of the manifest' in {k.what for k in report}, str(report)
    f = next(tmp_path.rglob('manifest.json')); m = json.loads(f.read_text()); m['result']['map'] += .1; f.write_text(json.dumps(m))
    assert not verify(tmp_path, data=data)


def test_validation_losses_change_nothing(data):
    "Statistics, modes and random numbers are those of a training without them"
    student, _ = models(small('fasterrcnn', 2, 8), TEACHER)
    dl = open_data(data).dls(4, ()).valid
    xb = dl.one_batch()[:2]
    seen, state = snapshot(student.eval()), torch.get_rng_state()
    with Watch(student) as w, torch.no_grad(): student(*xb); w.losses(xb)
    same(seen, snapshot(student)); assert torch.equal(state, torch.get_rng_state()) and n_hooks(student) == 0


# ---- tables

def test_tables_4_5_and_12_are_planned_without_data(tmp_path):
    t = beside_paper(4, tmp_path)
    assert set(t.verdict) == {'not run'} and t[t.method.str.startswith('diffkd')].paper.tolist() == [39.7, 39.8, 42.4, 42.5]
    two = beside_paper('4-two-stage', tmp_path)
    assert two.paper.tolist() == [38.4, 38.9, 40.4, 40.6, 40.7]
    assert beside_paper(12, tmp_path).paper.tolist() == [39.1, 39.2] and beside_paper(5, tmp_path).paper.notna().all()
    assert table_cost(12, lambda t, s, m: 10., images=118_287).hours.iloc[0] == pytest.approx(12*118_287/10/3600)
    with pytest.raises(InputError, match='torchvision_retinanet_resnet101_fpn_norm=frozen.safetensors'): run_table(4, 'coco:nowhere', tmp_path)


# ---- real pictures, where they are (folder in DIFFKD_DATA, by default ../shared/data)

DATA = Path(os.environ.get('DIFFKD_DATA', Path(__file__).parents[2]/'shared'/'data'))/'dense'
needs_data = pytest.mark.skipif(not (DATA/'unpack.py').is_file(), reason=f'{DATA} has no data for dense prediction')


def unpacked_pack(name, out):
    subprocess.run([sys.executable, str(DATA/'unpack.py'), name, str(out)], check=True, capture_output=True)
    return out


@needs_data
@pytest.mark.slow
def test_blood_cells(tmp_path, capsys):
    "Numbers of the pack's README; the XML beside the JSON gives the same boxes"
    folder = unpacked_pack('bccd', tmp_path/'bccd')
    with pytest.raises(InputError, match=r'box \d+ of BloodImage_00343.jpg .* has no area'): open_data(f'coco:{folder}')
    data, test = open_data(f'coco:{folder}?empty=drop'), open_data(f'coco:{folder}?empty=drop&valid=test')
    count = lambda found: [sum((p.labels == k).sum() for p in found) for k in (1, 2, 3)]
    assert data.classes == ['RBC', 'WBC', 'Platelets'] and (data.n_train, data.n_valid, test.n_valid) == (205, 87, 72)
    assert count(data.pictures[0]) == [2382 - 1, 214, 209] and count(data.pictures[1]) == [968 - 1, 87, 83] and count(test.pictures[1]) == [805, 71, 69]
    assert capsys.readouterr().err.count('1 box without area left out') == 3
    voc = tmp_path/'bccd'/'voc'; (voc/'images').symlink_to(folder/'images'); (voc/'classes.txt').write_text('RBC\nWBC\nPlatelets\n')
    same_boxes = open_data(f'voc:{voc}?empty=drop')
    by_name = {p.file.stem: p for p in data.pictures[0]}
    assert same_boxes.n_train == 205
    for p in same_boxes.pictures[0]: assert (p.boxes == by_name[p.file.stem].boxes).all() and (p.labels == by_name[p.file.stem].labels).all()


@needs_data
@pytest.mark.slow
def test_coco_from_file_to_verified_run(tmp_path):
    "COCO's 80 classes: the whole path, on a few of its pictures"
    folder = unpacked_pack('coco128', tmp_path/'coco128')
    spec = f'coco:{folder}?limit=8'
    data = open_data(spec)
    assert len(data.classes) == 80 and data.outputs == 81 and data.n_valid == 128 and sum(len(p.labels) for p in data.pictures[1]) == 898
    assert open_data(f'{spec}&numbers=keep').outputs == 91
    name, recipe = 'detector:retinanet?encoder=small:{}&width=16&min_size=96&anchor=16'.format, RECIPE.replace(epochs=1, batch_size=4)
    run(recipe, spec, None, name(4), 'alone', 0, tmp_path/'teacher', progress=False)
    m = run(recipe, spec, f"{name(4)}@{tmp_path/'teacher'/'student.safetensors'}", name(2), 'diffkd', 0, tmp_path/'run', progress=False)
    assert m['status'] == 'finished' and 0 <= m['result']['map'] < .1 and verify(tmp_path/'run', data=spec)


# ---- wrong input

def edited(folder, f):
    "A copy of made-up data whose training file is changed by a function"
    spec = write_objects(folder, (4, 2), (48, 64))
    path = folder/'instances_train.json'; d = json.loads(path.read_text()); f(d); path.write_text(json.dumps(d))
    return spec


def test_pictures_without_boxes_and_crowds_are_legal(tmp_path):
    def f(d):
        d['annotations'] = [a for a in d['annotations'] if a['image_id'] != 0]
        next(a for a in d['annotations'] if a['image_id'] == 1)['iscrowd'] = 1
    data = open_data(edited(tmp_path/'a', f))
    n = [len(p.labels) for p in data.pictures[0]]
    x, targets, index = data.dls(4, ()).train.one_batch()
    seen = {int(i): t for i,t in zip(index, targets)}
    assert n[0] == 0 and len(seen[0]['boxes']) == 0 and len(seen[1]['boxes']) == n[1] - 1 and data.pictures[0][1].crowd.sum() == 1
    student, teacher = models(STUDENT, TEACHER)
    for method in ('fgd', 'fitnet_boxes', 'diffkd'):
        with Distillation(student, teacher, method, (x, targets)) as kd: student(x, targets); assert torch.isfinite(kd((x, targets)).total)


@pytest.mark.parametrize('change,said', [
    (lambda d: d['annotations'][0].update(bbox=[5, 5, 0, 9]), r'box 1 of 0000.png .* has no area: mend the file, or pass empty=drop'),
    (lambda d: d['annotations'][0].update(bbox=[50, 5, 40, 9]), r'box 1 of 0000.png .* leaves the picture of 64 x 48'),
    (lambda d: d['annotations'][0].update(category_id=99), r'annotation 1 of 0000.png has the category 99, and the file lists 3, 7'),
    (lambda d: d['annotations'][0].update(image_id=99), 'annotation 1 is of picture 99, which the file does not list'),
    (lambda d: d['annotations'][0].update(bbox=[1, 2]), 'annotation 1 of 0000.png has no bbox of four numbers'),
    (lambda d: d['images'][0].update(file_name='gone.png'), r'picture .*gone.png is missing'),
    (lambda d: d.update(images=[]), "is no COCO file"),
    (lambda d: d.update(annotations=[]), 'has no boxes to learn from'),
    (lambda d: d['categories'].append(dict(id=9, name='star')), r'lists the categories disc, square, and training has disc, square, star')])
def test_one_error_that_names_the_file(change, said, tmp_path):
    with pytest.raises(InputError, match=said): open_data(edited(tmp_path/'x', change))


def test_rules_for_boxes_that_cannot_be_meant(tmp_path, capsys):
    spec = edited(tmp_path/'x', lambda d: (d['annotations'][0].update(bbox=[5, 5, 0, 9]), d['annotations'][1].update(bbox=[50, 5, 40, 9])))
    data = open_data(f'{spec}?empty=drop&outside=clip')
    assert 'training: 1 box without area left out and 1 box cut at the edge' in capsys.readouterr().err
    assert max(p.boxes[:, 2].max() for p in data.pictures[0] if len(p.boxes)) <= 64
    with pytest.raises(InputError, match='empty must be stop or drop'): open_data(f'{spec}?empty=maybe')
    with pytest.raises(InputError, match="has no option 'size'"): open_data(f'{spec}?size=3')


def test_a_picture_of_another_size_is_told(tmp_path):
    spec = edited(tmp_path/'x', lambda d: d['images'][0].update(height=40))
    with pytest.raises(Exception, match='is 64 x 48, and its boxes were drawn on 64 x 40'): next(iter(open_data(f'{spec}?outside=clip').dls(4, ()).train))


def test_numbers_of_categories_are_mapped_or_kept(tmp_path):
    spec = write_objects(tmp_path/'x', (3, 2), (48, 64))
    mapped, kept = open_data(spec), open_data(f'{spec}?numbers=keep')
    assert mapped.outputs == 3 and kept.outputs == 8 and kept.classes == [None, None, 'disc', None, None, None, 'square']
    for a,b in zip(mapped.pictures[0], kept.pictures[0]): assert {1: 3, 2: 7}[int(a.labels[0])] == int(b.labels[0])


def test_options_that_do_not_fit_are_one_error(data, teacher, tmp_path):
    with pytest.raises(InputError, match='expected torchvision:FAMILY_BACKBONE_fpn'): run(RECIPE, data, None, 'resnet20', 'alone', 0, tmp_path/'a', progress=False)
    with pytest.raises(InputError, match="'crop:8' is not one for pictures with boxes"): run(RECIPE.replace(augmentation=('crop:8',)), data, None, STUDENT, 'alone', 0, tmp_path/'b', progress=False)
    with pytest.raises(InputError, match='label_smoothing must be 0'): run(RECIPE.replace(label_smoothing=.1), data, None, STUDENT, 'alone', 0, tmp_path/'c', progress=False)
    assert task_of(dict(task='detection')).metric == 'map'


# ---- found in use

def pairs_alone(data, bs=3, style='list'):
    "Loaders of pictures and targets, as torchvision's references have them"
    from fastai.data.load import DataLoader
    from fastai.data.core import DataLoaders
    made = open_data(data).dls(bs, ()).train.dataset
    rows = [(x.float()/255, t) for x,t,_ in (made[i] for i in range(6))]
    batch = (lambda b: tuple(zip(*b))) if style == 'tuple' else (lambda b: tuple(map(list, zip(*b))))
    dl = DataLoader(rows, bs=bs, create_batch=batch, num_workers=0)
    if style == 'inputs': dl.n_inp = 2
    return DataLoaders(dl, dl)


@pytest.mark.parametrize('style', ['list', 'tuple', 'inputs'])
@pytest.mark.parametrize('distils', [False, True])
def test_batches_of_pictures_and_targets_alone_train(data, style, distils):
    student, teacher = models(STUDENT, TEACHER)
    learn = detection_learner(pairs_alone(data, style=style), student, [DiffKDCallback(teacher, verbose=False)]*distils)
    was = student.state_dict()['head.classification_head.cls_logits.weight'].clone()
    row = fit(learn, lr=.01)
    assert np.isfinite(row['train_loss']) and np.isfinite(row['valid_loss']) and (row['kd'] > 0 if distils else True)
    assert not torch.equal(was, student.state_dict()['head.classification_head.cls_logits.weight'])


def changed(data, tmp_path, change, split='val'):
    "A copy of the made-up data whose JSON is changed"
    import shutil
    shutil.copytree(data.partition(':')[2], d := tmp_path/'changed')
    f = d/f'instances_{split}.json'; made = json.loads(f.read_text()); change(made, d); f.write_text(json.dumps(made))
    return f'coco:{d}'


def test_crowds_count_in_no_loss(data, tmp_path):
    def crowd(made, d):
        for i in made['images']: made['annotations'].append(dict(id=1000+i['id'], image_id=i['id'], category_id=3, bbox=[0, 0, i['width'], i['height']], iscrowd=1, area=1))
    model, _ = models(STUDENT, TEACHER)
    loss = lambda spec: detection_learner(open_data(spec).dls(3, ()), model, metrics=[])
    with quiet(loss(data)) as a, quiet(loss(changed(data, tmp_path, crowd))) as b: assert a.validate()[0] == pytest.approx(b.validate()[0], rel=1e-6)


def test_sizes_are_those_of_the_outlines(data, tmp_path):
    "Precision by size uses the file's areas, as pycocotools does, and the data is another one"
    def outlines(made, d):
        for a in made['annotations']: a['area'] = .01*a['area'] if a['id'] % 2 else 20_000
    spec, model = changed(data, tmp_path, outlines), models(STUDENT, TEACHER)[0]
    assert open_data(spec).hash() != open_data(data).hash()
    areas = {int(t['image_id']): t['area'] for _,t,_ in open_data(spec).dls(2, ()).valid.dataset}
    stored = json.loads((Path(spec.partition(':')[2])/'instances_val.json').read_text())['annotations']
    assert all(torch.allclose(areas[i], torch.tensor([float(a['area']) for a in stored if a['image_id'] == i])) for i in areas)
    perfect = lambda s: read_precision(_perfect(open_data(s)), ['disc', 'square'])
    assert perfect(data)['map_large'] != perfect(data)['map_large'] and perfect(spec)['map_large'] == 1


def _perfect(data):
    metric = new_precision()
    for _,t,_ in data.dls(2, ()).valid.dataset: metric.update([dict(boxes=t['boxes'], labels=t['labels'], scores=torch.ones(len(t['labels'])))], [{k: v for k,v in t.items() if k != 'image_id'}])
    return metric


@pytest.mark.parametrize('change,said', [
    (lambda m, d: m['images'][0].pop('height'), 'no file_name, height and width'), (lambda m, d: m['images'][0].pop('file_name'), 'no file_name, height and width'),
    (lambda m, d: m['images'][0].update(width=None), 'no file_name, height and width'), (lambda m, d: m['categories'][0].pop('name'), 'without a whole number as id, or without a name'),
    (lambda m, d: m['categories'][0].update(id='disc'), 'without a whole number as id, or without a name|category'), (lambda m, d: m['categories'].append(dict(id=3, name='again')), 'category 3 more than once'),
    (lambda m, d: (d/'instances_val2.json').write_text((d/'instances_val.json').read_text()) and (d/'instances_val.json').rename(d/'instances_val1.json'), None)])
def test_json_that_does_not_fit_is_one_error(change, said, data, tmp_path):
    if said is None:
        spec = changed(data, tmp_path, lambda m, d: None); d = Path(spec.partition(':')[2])
        (d/'instances_val2.json').write_text((d/'instances_val.json').read_text()); (d/'instances_val.json').rename(d/'instances_val1.json')
        with pytest.raises(InputError, match='instances_val1.json and instances_val2.json: name the one'): open_data(spec)
        return
    with pytest.raises(InputError, match=said): open_data(changed(data, tmp_path, change))


def test_what_files_may_say(data, tmp_path):
    "No mark of a crowd, sides as text, pictures by their whole path"
    def change(made, d):
        for a in made['annotations']: a['iscrowd'] = None
        for i in made['images']: i.update(height=str(i['height']), file_name=str(d/'images'/'val'/i['file_name']))
    a, b = open_data(data), open_data(changed(data, tmp_path, change))
    assert b.hash().startswith('content:') and all(np.array_equal(x.boxes, y.boxes) for x,y in zip(a.pictures[1], b.pictures[1]))


def test_a_teacher_of_other_classes_is_refused(data, teacher, tmp_path):
    def renamed(made, d): made['categories'][0]['name'] = 'cell'
    spec = changed(data, tmp_path, renamed); f = Path(spec.partition(':')[2])/'instances_train.json'
    made = json.loads(f.read_text()); renamed(made, None); f.write_text(json.dumps(made))
    with pytest.raises(InputError, match='trained on the classes disc, square and the data has cell, square'): run(RECIPE, spec, teacher, STUDENT, 'diffkd', 0, tmp_path/'out', progress=False)


def test_an_interrupted_validation_leaves_the_student_clean(data):
    from fastai.basics import CancelValidException
    student, _ = models(STUDENT, TEACHER)
    for error in (KeyboardInterrupt, CancelValidException):
        learn = detection_learner(open_data(data).dls(3, ()), student)
        class Stop(Callback):
            def after_loss(self):
                if not self.training: raise error()
        learn.add_cb(Stop())
        try: fit(learn)
        except KeyboardInterrupt: pass
        assert n_hooks(student) == 0


def test_one_picture_is_shown(data):
    import matplotlib; matplotlib.use('Agg')
    learn = detection_learner(open_data(data).dls(3, ()), models(STUDENT, TEACHER)[0])
    with learn.no_bar(): learn.show_results(max_n=1)


def test_a_transform_sees_pictures_and_no_boxes(data):
    student, teacher = models(STUDENT, TEACHER); seen = []
    def shift(x): seen.append(tuple(x.shape)); return (x - torch.tensor([.1, .2, .3])[:, None, None]).clamp(0, 1)
    fit(detection_learner(open_data(data).dls(6, ()), student, DiffKDCallback(teacher, teacher_transform=shift, verbose=False)))
    assert {len(s) for s in seen} == {3}


def test_what_compares_scores_is_refused_in_words(data):
    student, teacher = models(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="a detector gives boxes: use 'heads' or 'rois'"): fit(detection_learner(open_data(data).dls(6, ()), student, DistillCallback(teacher, 'kd', verbose=False)))
    with pytest.raises(InputError, match='has 2 classes, and the data needs 3'): detection_learner(open_data(data).dls(6, ()), models(STUDENT, TEACHER, 2)[0])


def test_names_of_voc_have_blanks_and_doubles_are_told(tmp_path):
    for d in ('JPEGImages', 'Annotations', 'ImageSets/Main'): (tmp_path/d).mkdir(parents=True)
    for i in range(4):
        Image.new('RGB', (40, 30)).save(tmp_path/'JPEGImages'/f'{i}.png')
        (tmp_path/'Annotations'/f'{i}.xml').write_text('<annotation><size><width>40</width><height>30</height></size><object><name>traffic light</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object></annotation>')
    for s,names in dict(train='0\n1\n', val='2\n3\n').items(): (tmp_path/'ImageSets'/'Main'/f'{s}.txt').write_text(names)
    (tmp_path/'classes.txt').write_text('traffic light\ncat\n')
    assert open_data(f'voc:{tmp_path}').classes == ['traffic light', 'cat']
    Image.new('RGB', (40, 30)).save(tmp_path/'JPEGImages'/'2.jpg')
    with pytest.raises(InputError, match='have one name'): open_data(f'voc:{tmp_path}')
    (tmp_path/'classes.txt').write_text('\n')
    (tmp_path/'JPEGImages'/'2.jpg').unlink()
    with pytest.raises(InputError, match='names no class'): open_data(f'voc:{tmp_path}')
