"""Sentences from data to a verified comparison: trained, killed and resumed, with a cache, with a transformer as teacher and as student."""
import json, random
import pandas as pd, pytest, torch
import workers
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.rnn import rnn_cbs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from resuming import cut_and_resumed
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.comparison import compare
from diffkd_nb.distillation import Distillation
from diffkd_nb.files import InputError
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import evaluate, run
from diffkd_nb.taps import plan_table, plan_taps
from diffkd_nb.tasks import open_data, task_of
from diffkd_nb.text import text_model
from diffkd_nb.verify import verify
from diffkd_nb.weights import load_weights

RECIPE = get_recipe('text').replace(epochs=3, batch_size=20)


def sentences(n, seed):
    "Which animal comes first? Made up"
    rng = random.Random(seed)
    for _ in range(n):
        words, (i, j) = [rng.choice('red green blue small'.split()) for _ in range(rng.randint(2, 5))], sorted(rng.sample(range(4), 2))
        first, second = ('cat', 'dog') if rng.random() < .5 else ('dog', 'cat')
        words.insert(i, first); words.insert(j, second)
        yield ' '.join(['The', *words]), first


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    f = tmp_path_factory.mktemp('text')/'animals.csv'
    pd.DataFrame(sentences(250, 0), columns=['text', 'label']).to_csv(f, index=False)
    return f'csv:{f}'


@pytest.fixture(scope='module')
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    m = run(RECIPE.replace(epochs=12), data, None, 'bigru:16', 'alone', 0, out, progress=False)
    assert m['result']['accuracy'] > .9 and m['settings']['task'] == 'text'
    return f"bigru:16@{out/'student.safetensors'}"


@pytest.fixture(scope='module')
def bert(data, tmp_path_factory):
    "A tiny transformer with random weights and a tokenizer of words, in a folder as transformers write it"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    folder, words = tmp_path_factory.mktemp('bert'), '[PAD] [UNK] the cat dog red green blue sma ##ll'.split()
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]')); t.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=t, pad_token='[PAD]', unk_token='[UNK]').save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('method', ['diffkd', 'kd+diffkd:taps=feature', 'diffkd:denoiser=identity,taps=feature', 'dist'])
def test_methods_train(data, teacher, method, tmp_path):
    m = run(RECIPE, data, teacher, 'textcnn:4', method, 0, tmp_path, progress=False)
    log = pd.read_csv(tmp_path/'log.csv')
    assert log.train_loss.iloc[-1] < log.train_loss.iloc[0]
    assert [t['student_shape'] for t in m['taps'] if t['kind'] == 'feature'] == [[12, 1, 1]]*('feature' in method or method == 'diffkd')


def test_killed_and_resumed(data, teacher, tmp_path, monkeypatch):
    cut_and_resumed(lambda out: run(RECIPE, data, teacher, 'bigru:4', 'diffkd', 1, out, progress=False), tmp_path, monkeypatch)


def test_cache_gives_the_same_student(data, teacher, tmp_path):
    args = RECIPE, data, teacher, 'bigru:4', 'kd', 0
    plain = run(*args, tmp_path/'plain', progress=False)
    first, second = (run(*args, tmp_path/n, cache=tmp_path/'cache', progress=False) for n in ('first', 'second'))
    assert first['student_hash'] == second['student_hash']
    assert first['result']['valid_loss'] == pytest.approx(plain['result']['valid_loss'], abs=1e-4)     # other batches, other rounding
    assert any((tmp_path/'cache').rglob('records'))


def test_transformer_teaches_and_learns(data, bert, tmp_path):
    name = f'hf:{bert}'
    run('tune', data, None, name, 'alone', 0, tmp_path/'t', progress=False)
    m = run(RECIPE.replace(epochs=1), data, f"{name}@{tmp_path/'t'/'student.safetensors'}", 'bigru:4', 'diffkd', 0, tmp_path/'s', progress=False)
    assert [t['teacher_shape'] for t in m['taps']] == [[16, 1, 1], [2, 1, 1]]
    opened = open_data(data); model = load_weights(text_model(name, opened), tmp_path/'t'/'student.safetensors').eval()
    rows = opened.words.rows(opened.xv[:4])
    with torch.no_grad(): alone, padded = model(rows[:1, :(rows[0] != 0).sum()]), model(torch.nn.functional.pad(rows, (0, 3)))[:1]
    assert torch.allclose(alone, padded, atol=1e-5)
    pieces, there = model.pieces(rows[:1])
    assert model.tokenizer.convert_ids_to_tokens(pieces[0][there[0]].tolist())[0] == '[UNK]'        # 'The': its vocabulary has small letters only


@pytest.mark.slow
def test_compares_and_verifies(data, teacher, tmp_path):
    c = compare([(teacher, 'bigru:4')], ['alone', 'kd'], 2, RECIPE, data, tmp_path, executor='here', threads=1, progress=False)
    assert not c.failed and c.task.name == 'text' and list(c.table().n) == [2, 2]
    report = verify(tmp_path, data=data, teacher=teacher.partition('@')[2])
    assert report and 'the student gives the accuracy of the manifest' in {k.what for k in report}, str(report)
    f = next(tmp_path.rglob('manifest.json')); m = json.loads(f.read_text()); m['result']['accuracy'] += .1; f.write_text(json.dumps(m))
    assert not verify(tmp_path, data=data)


def test_a_manifest_names_no_files_elsewhere(data, bert, tmp_path):
    run('tune', data, None, f'hf:{bert}', 'alone', 0, tmp_path, progress=False)
    report = verify(tmp_path, data=data)
    assert not report and 'names files elsewhere' in str(report) and 'trust=True' in str(report)
    assert verify(tmp_path, data=data, trust=True)


def test_the_command_trains_on_a_table(data, tmp_path):
    r = workers.command('diffkd_nb.commands:train_main', '--data', data, '--recipe', 'text', '--epochs', '1', '--batch-size', '20', '--student', 'bigru:4',
                        '--method', 'alone', '--out', tmp_path/'o')
    assert r.returncode == 0 and 'bigru:4, alone, seed 0' in r.stdout, r.stderr
    assert task_of(json.loads((tmp_path/'o'/'manifest.json').read_text())['settings']).name == 'text'
    assert evaluate(load_weights(text_model('bigru:4', open_data(data)), tmp_path/'o'/'student.safetensors'), data)[0] > .3


def test_a_teacher_of_other_sentences_is_refused(data, teacher, tmp_path):
    "Some sentences more: the same words, which are numbered in another order"
    f = tmp_path/'more.csv'
    more = pd.DataFrame([(' '.join(['blue']*i + [a, b]), a) for i in range(4, 20) for a, b in (('cat', 'dog'), ('dog', 'cat'))], columns=['text', 'label'])
    pd.concat([pd.read_csv(data.partition(':')[2]), more]).to_csv(f, index=False)
    with pytest.raises(InputError, match='trained on other sentences'): run(RECIPE, f'csv:{f}', teacher, 'textcnn:4', 'kd', 0, tmp_path/'out', progress=False)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision(data, bert, dtype, tmp_path):
    import shutil
    from transformers import BertModel
    shutil.copytree(bert, half := tmp_path/'half'); BertModel.from_pretrained(half).to(dtype).save_pretrained(half)
    opened = open_data(data); m = text_model(f'hf:{half}', opened)
    assert {p.dtype for p in m.parameters()} == {torch.float32} and m(opened.rows[:3]).shape == (3, 2)
    for f in half.glob('*token*'): f.unlink()
    with pytest.raises(InputError, match='no words in its tokenizer|no folder of transformers'): text_model(f'hf:{half}', opened)


def test_states_of_classifiers_and_encoders_of_hugging_face():
    "A decoder scores each word and counts the last; an encoder gives states alone: what is compared is states"
    import transformers as hf
    class Of(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(**x)
    gpt = lambda w: Of(hf.GPT2ForSequenceClassification(hf.GPT2Config(vocab_size=20, n_embd=w, n_layer=1, n_head=2, n_positions=16, num_labels=3, pad_token_id=0)))
    enc = lambda w: Of(hf.BertModel(hf.BertConfig(vocab_size=20, hidden_size=w, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2*w)))
    x = dict(input_ids=torch.randint(1, 20, (4, 7)), attention_mask=torch.ones(4, 7, dtype=torch.long))
    for make, name, asked in ((gpt, 'net.transformer.ln_f', ('feature', 'words', 'stages')), (enc, 'net.encoder.layer.0', ('feature', 'words'))):
        for tap in asked:
            t, = plan_taps(make(8), make(16), x, taps=[tap], output='classes')
            assert (t.student.name, t.student.shape[0], t.teacher.shape[0]) == (name, 8, 16)


@pytest.mark.parametrize('method', ['diffkd', 'kd', 'fitnet', 'fmkt'])
def test_a_student_in_bfloat16(method):
    "As `from_pretrained` may give it: the distillation computes in float32"
    make = lambda c: nn.Sequential(nn.Conv2d(3, c, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4))
    student, teacher, x = make(8).bfloat16(), make(16), torch.randn(4, 3, 8, 8).bfloat16()
    kd = Distillation(student, teacher.bfloat16(), method, (x,), output='classes')
    with kd: student(x); step = kd((x,), torch.arange(4))
    step.total.backward()
    assert step.total.dtype == torch.float32 and torch.isfinite(step.total) and student[0].weight.grad.dtype == torch.bfloat16


def test_bad_names_are_one_error(data, teacher, tmp_path):
    with pytest.raises(InputError, match='mixes samples .mixup=0.2'): run(RECIPE.replace(mixup=.2), data, teacher, 'textcnn:4', 'kd', 0, tmp_path/'mixed', progress=False)
    for student,says in (('bigru:x', 'bigru:N'), ('resnet20', 'no model of sentences'), (f'hf:{tmp_path}/nothing', 'no folder of transformers')):
        with pytest.raises(InputError, match=says): run(RECIPE, data, None, student, 'alone', 0, tmp_path/'o', progress=False)
    with pytest.raises(InputError, match='no augmentation'): run('small', data, None, 'bigru', 'alone', 0, tmp_path/'p', progress=False)
    with pytest.raises(InputError, match='teacher_stats'): run(RECIPE, data, teacher, 'bigru', 'kd', 0, tmp_path/'q', teacher_stats='imagenet', progress=False)
    assert not [f for f in tmp_path.rglob('*') if f.is_file() and f.name != '.lock']


class Classifier(nn.Module):
    "A Hugging Face model as fastai calls models: the input is a dict of tensors, the output an object with fields"
    def __init__(self, hidden, layers):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification
        self.net = BertForSequenceClassification(BertConfig(
            vocab_size=30, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2*hidden, num_labels=3, max_position_embeddings=16))
    def forward(self, x): return self.net(**x)


def padded(n, length=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        k, ids = int(torch.randint(3, 9, (1,), generator=g)), torch.randint(1, 30, (8,), generator=g)
        there = (torch.arange(length) < k).long()
        yield dict(input_ids=F.pad(ids, (0, length - 8))*there, attention_mask=there), int(ids[0] % 3)


def scores_loss(out, y): return F.cross_entropy(out.logits, y)


def test_a_hugging_face_student_ends_in_save_pretrained(tmp_path):
    from transformers import BertForSequenceClassification
    set_seed(0)
    dls = DataLoaders.from_dsets(list(padded(48)), list(padded(16, seed=1)), bs=16, device='cpu', num_workers=0)
    teacher = Classifier(32, 2)
    cb = DiffKDCallback(teacher, output='classes', output_key='logits', verbose=False)
    learn = Learner(dls, Classifier(16, 1), loss_func=scores_loss, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    assert [(t.kind, t.student.layout.kind, t.student.shape) for t in cb.plan] == [('feature', 'words', (16, 1, 1)), ('logits', 'vector', (3, 1, 1))]
    assert learn.recorder.values[-1][0] < learn.recorder.values[0][0]
    learn.model.net.save_pretrained(tmp_path)
    plain, (x, _) = BertForSequenceClassification.from_pretrained(tmp_path).eval(), next(iter(dls.valid))
    with torch.no_grad(): assert torch.equal(plain(**x).logits, learn.model.eval()(x).logits)


def added_padding(x, left):
    "Batch `x` with four more padded positions at the end, or in front too"
    return {k: F.pad(v, (3 if left else 0, 4)) for k,v in x.items()}


@pytest.mark.parametrize('method,how,left', [
    ('diffkd', 'words', False), ('diffkd:predicts=clean,latent=6', 'words', False), ('kd+diffkd', 'words', False), ('fitnet', 'pooled', False),
    ('rkd', 'pooled', False), ('rkd+diffkd', 'pooled', False), ('diffkd by its mean', 'pooled', False),
    ('diffkd:taps=feature', 'words', True), ('fitnet', 'pooled', True)])            # BERT's scores come from the first position
def test_padding_changes_no_loss(method, how, left):
    set_seed(0)
    student, teacher = Classifier(16, 1).eval(), Classifier(32, 2).eval()
    x = default_collate([x for x,_ in padded(8)])
    if left: x = {k: v.flip(1) for k,v in x.items()}
    taps, name = None, method.partition(' ')[0]
    if ' ' in method: taps = [dict(student='net.bert.encoder.layer.0', teacher='net.bert.encoder.layer.1', layout='pooled')]
    kd = Distillation(student, teacher, name, (x,), taps, output_key='logits', seed=3)
    assert {t.student.layout.kind for t in kd.plan if t.kind == 'feature'} == {how}, str(kd)
    losses = []
    for batch in (x, added_padding(x, left)):
        batch['position_ids'] = (batch['attention_mask'].cumsum(1) - 1).clamp_min(0)        # a word is where it was
        kd.generator = None             # the same draws
        with kd: student(batch); losses.append(kd((batch,)).losses)
    assert losses[0].keys() == losses[1].keys() and all(torch.allclose(losses[0][k], losses[1][k], rtol=1e-4) for k in losses[0])


def of_fastai(width, longest=None):
    "fastai's classifier of texts, which reads four words at a time"
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
    config = dict(awd_lstm_clas_config, emb_sz=width, n_hid=width, n_layers=1)
    return get_text_classifier(AWD_LSTM, 30, 3, seq_len=4, config=config, lin_ftrs=[5], max_len=longest).eval()


@pytest.mark.parametrize('method,longest,how', [('diffkd', None, 'words'), ('fitnet', None, 'pooled'), ('diffkd', 8, 'pooled')])
def test_fastai_reads_a_text_in_parts(method, longest, how):
    "The states of all parts are compared, without padding; a longer batch has more parts. A teacher may see the last words only"
    set_seed(0)
    student, teacher = of_fastai(8), of_fastai(12, longest)
    x = torch.randint(2, 30, (6, 11)).masked_fill(torch.arange(11) >= torch.tensor([[11], [11], [10], [9], [9], [8]]), 1)
    kd = Distillation(student, teacher, method, (x if longest else x[:, :7],), seed=3)
    assert [t.student.layout.kind for t in kd.plan if t.kind == 'feature'] == [how] and '0[0]' in str(kd)
    losses = []
    for batch in (x, F.pad(x, (0, 1), value=1)):
        kd.generator = None             # the same draws
        with kd: student(batch); losses.append(kd((batch,)).losses)
    assert losses[0].keys() == losses[1].keys() and all(torch.allclose(losses[0][k], losses[1][k], rtol=1e-4) for k in losses[0])


@pytest.mark.parametrize('cb', [lambda t: DiffKDCallback(t, taps=['stages', 'logits'], verbose=False), lambda t: DistillCallback(None, 'pskd', verbose=False)], ids=['stages', 'pskd'])
def test_fastai_texts_of_any_length(cb):
    "The first batch is short, a later one has more parts; the student is copied, which PyTorch refuses as it is"
    set_seed(0)
    rows = [(torch.randint(2, 30, (k,)), i % 3) for i,k in enumerate([3]*8 + [11]*16)]
    pad = lambda b: (torch.stack([F.pad(x, (0, max(len(x) for x,_ in b) - len(x)), value=1) for x,_ in b]), torch.tensor([y for _,y in b]))
    loader = lambda rows: DataLoader(rows, bs=8, create_batch=pad, num_workers=0)
    cb = cb(of_fastai(12)); learn = Learner(DataLoaders(loader(rows), loader(rows[:8])), of_fastai(8), loss_func=CrossEntropyLossFlat(), cbs=[*rnn_cbs(), cb])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    assert all(v == v for row in learn.recorder.values for v in row)


class Tagger(nn.Module):
    "Class scores of each word; the embedding knows the padding"
    def __init__(self, width, known=True):
        super().__init__()
        self.words, self.read, self.fc = nn.Embedding(30, width, 0 if known else None), nn.GRU(width, width, batch_first=True), nn.Linear(width, 4)
    def forward(self, x): return self.fc(self.read(self.words(x))[0])


def tagged(n=6):
    "Sentences, and a class for each word; -100 for the first word and for padding"
    x = torch.randint(1, 30, (n, 7)).masked_fill(torch.arange(7) >= torch.tensor([7, 6, 5, 3, 2, 7][:n])[:, None], 0)
    return x, (x % 4).masked_fill((x == 0) | (torch.arange(7) == 0), -100)


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('method', ['kd', 'dist', 'dkd', 'wttm', 'diffkd:taps=logits'])
def test_each_scored_word_is_a_sample(method, known):
    "Losses are those of a classifier of single words; padding takes no part, nor for methods with labels a word without one"
    set_seed(0)
    student, teacher, (x, y) = Tagger(8, known).eval(), Tagger(12, known).eval(), tagged()
    kd = Distillation(student, teacher, method, (x,), output='classes', seed=3)
    assert [t.student.layout.kind for t in kd.plan] == ['each_word' if known else 'each_position'] and 'each_' in str(kd)
    with kd: student(x); losses = kd((x,), y).losses
    rows = (y >= 0 if method == 'dkd' else x > 0 if known else x == x)
    maps = [{'logits': m(x)[rows].detach()[..., None, None]} for m in (student, teacher)]
    kd.generator = None
    with kd: want = kd.distiller(*maps, y[rows], draws=kd.draws)
    assert losses.keys() == want.keys() and all(torch.allclose(losses[k], want[k], rtol=1e-5) for k in want), (losses, want)


def test_scores_of_other_words_are_refused():
    student, teacher, (x, _) = Tagger(8), Tagger(12), tagged()
    with pytest.raises(ValueError, match='scores 7 words of a sentence and the teacher 5'):
        Distillation(student, teacher, 'kd', (x,), teacher_transform=lambda x: x[:, :5], output='classes')
    with pytest.raises(ValueError, match='are for class scores'):
        Distillation(student, teacher, 'fitnet', (x,), [dict(student='words', teacher='words', layout='each_word')])
    with pytest.raises(ValueError, match='also compares whole sentences'), Distillation(student, teacher, 'dkd+fitnet', (x,), output='classes') as kd:
        student(x); kd((x,), tagged()[1])


def test_a_causal_model_of_hugging_face():
    "One line: hidden states and scores, word by word"
    from transformers import GPT2Config, GPT2LMHeadModel
    class Causal(Classifier):
        def __init__(self, width):
            nn.Module.__init__(self)
            self.net = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=width, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1))
    set_seed(0)
    student, teacher, x = Causal(16).eval(), Causal(32).eval(), default_collate([x for x,_ in padded(8)])
    both = Distillation(student, teacher, 'diffkd', (x,), output='classes')
    assert [(t.student.layout.kind, t.student.shape[0]) for t in both.plan] == [('words', 16), ('each_word', 30)]
    with Distillation(student, teacher, 'kd', (x,), output='classes') as kd: student(x); loss = kd((x,)).losses['kd']
    s, t = (m(x).logits[x['attention_mask'].bool()]/4 for m in (student, teacher))
    assert torch.allclose(loss, 16*F.kl_div(s.log_softmax(1), t.softmax(1), reduction='batchmean'), rtol=1e-4)


def test_language_models():
    "fastai's, whose output is a tuple and whose memory goes from batch to batch"
    from fastai.text.all import AWD_LSTM, awd_lstm_lm_config, get_language_model
    net = lambda w: get_language_model(AWD_LSTM, 40, dict(awd_lstm_lm_config, emb_sz=w, n_hid=w, n_layers=1))
    set_seed(0)
    rows = torch.randint(2, 40, (32, 9)); pairs = [(r[:-1], r[1:]) for r in rows]
    dls = DataLoaders.from_dsets(pairs, pairs[:8], bs=8, device='cpu', num_workers=0)
    cb, student = DiffKDCallback(net(24), verbose=False), net(8)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=cb).add_cbs(rnn_cbs())       # in fastai's order
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    assert [(t.student.layout.kind, t.student.shape[0]) for t in cb.plan] == [('words', 8), ('each_word', 40)] and cb.plan[1].student.key == 0
    log = learn.recorder.values; assert log[-1][0] < log[0][0] and all(v == v for row in log for v in row)


def test_a_transformer_teaches_fastais_model():
    "Each names its scores in its own way"
    set_seed(0)
    student, teacher, x = of_fastai(8), Classifier(32, 2).eval(), torch.randint(2, 30, (8, 7))
    cb = DistillCallback(teacher, 'kd', teacher_transform=lambda x: dict(input_ids=x, attention_mask=(x != 1).long()), verbose=False)
    rows = list(zip(x, torch.arange(8) % 3)); dls = DataLoaders.from_dsets(rows, rows, bs=4, device='cpu', num_workers=0)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=[*rnn_cbs(), cb])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert (cb.plan[0].student.key, cb.plan[0].teacher.key) == (0, 'logits')


def test_other_words_are_compared_by_their_mean():
    "A teacher with another tokenizer"
    set_seed(0)
    student, teacher = Classifier(16, 1), Classifier(32, 2)
    x, other = (default_collate([x for x,_ in padded(8, n, seed)]) for n,seed in ((8, 0), (12, 1)))
    places = plan_taps(student, teacher, x, teacher_xb=(other,), output_key='logits', by_word=True)
    assert 'pooled' in plan_table(places) and 'words' in plan_table(plan_taps(student, teacher, x, output_key='logits', by_word=True))


@pytest.mark.slow
@pytest.mark.parametrize('student', ['bigru:4', 'textcnn:4'])
def test_words_killed_and_resumed(data, teacher, student, tmp_path, monkeypatch):
    "Two models of sentences read the same words: their hidden states are compared word by word"
    how = dict(taps=['words', 'logits'], progress=False)
    m = run(RECIPE.replace(epochs=1), data, teacher, student, 'diffkd', 1, tmp_path/'plain', diagnostics=True, **how)
    assert m['taps'][0]['student_shape'][1:] == [1, 1]       # of no fixed length
    cut_and_resumed(lambda out: run(RECIPE, data, teacher, student, 'diffkd', 1, out, **how), tmp_path, monkeypatch)
    with pytest.raises(InputError, match="layout='pooled'"): run(RECIPE, data, teacher, student, 'diffkd', 1, tmp_path/'c', cache=tmp_path/'cache', **how)


def test_words_under_bf16():
    "Losses as in float32, up to bfloat16's rounding"
    set_seed(0)
    student, teacher, losses = Classifier(16, 1).eval(), Classifier(32, 2), []
    x = default_collate([x for x,_ in padded(8)])
    kd = Distillation(student, teacher, 'diffkd', (x,), output_key='logits', seed=3)
    for on in (False, True):
        kd.generator = None
        with kd, torch.autocast('cpu', torch.bfloat16, enabled=on): student(x); losses.append(kd((x,)).losses)
    assert all(v.dtype == torch.float32 for v in losses[1].values())
    assert all(torch.allclose(losses[0][k], losses[1][k], rtol=3e-2) for k in losses[0]), losses


@pytest.mark.parametrize('options', [dict(pretrain=3), dict(norms='separate', start='gamma'), dict(trained_by='diffusion', latent=6)])
def test_words_train(options):
    "Losses fall and are finite; the teacher's states are learnt before the student begins"
    set_seed(0)
    dls = DataLoaders.from_dsets(list(padded(48)), list(padded(16, seed=1)), bs=16, device='cpu', num_workers=0)
    cb = DiffKDCallback(Classifier(32, 2), output='classes', output_key='logits', verbose=False, **options)
    learn = Learner(dls, Classifier(16, 1), loss_func=scores_loss, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 5e-3)
    log = learn.recorder.values
    assert cb.plan[0].form == 'words' and log[-1][0] < log[0][0] and all(v == v for row in log for v in row)


@pytest.mark.cuda
def test_words_on_a_gpu():
    "The losses and gradients of the same draws, as on the CPU"
    from diffkd_nb.diffkd import DiffKD
    torch.manual_seed(0)
    tap, there = DiffKD(8, 16, 'words', latent=6), (torch.arange(7) < torch.tensor([[7], [4], [2], [6]]))[:, None, :, None].float()
    maps = [torch.cat([torch.randn(4, c, 7, 1)*there, there], 1) for c in (8, 16)]
    drawn, found = (torch.randn(4, 6, 7, 1), torch.randn(4, 6, 7, 1), torch.randint(0, 1000, (4,))), []
    for place in ('cpu', 'cuda'):
        tap.to(place).zero_grad()
        s, t = (m.to(place) for m in maps)
        s.requires_grad_()
        out = tap(s, t, *(d.to(place) for d in drawn))
        (out.kd_loss + out.diffusion_loss + out.reconstruction_loss).backward()
        found.append([x.detach().cpu() for x in (out.kd_loss, out.diffusion_loss, out.reconstruction_loss, s.grad)])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
