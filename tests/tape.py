"""A recording of a training step that works on the CPU, for tests and pages of `diffkd_nb.fast`.

`TapeRecording` takes the place of `CudaRecording`: `record(step)` notes every operation of PyTorch with its tensors,
`replay()` does them again, each into the memory of its first result. It refuses what a CUDA graph refuses most often:
to look at a value, to bring numbers from the host, shapes that depend on values. It is not faster than a plain step.
"""
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VALUE = 'the value of a tensor is asked for'
DECISION = 'a decision depends on the value of a tensor'
HOST = 'a tensor is made from numbers of the host'
SHAPE = 'a shape depends on values'

# What cannot be recorded: operation to reason
REFUSED = {'aten._local_scalar_dense': VALUE, 'aten.is_nonzero': DECISION, 'aten.equal': DECISION,
           'aten.lift_fresh': HOST, 'aten.nonzero': SHAPE, 'aten.masked_select': SHAPE, 'aten._unique2': SHAPE,
           'aten.unique_dim': SHAPE, 'aten.repeat_interleave': SHAPE}


class CannotRecord(RuntimeError): "An operation that no recording can repeat"


def tensors(o):
    "All tensors in nested lists and tuples"
    if isinstance(o, Tensor): return [o]
    return [t for x in o for t in tensors(x)] if isinstance(o, (list, tuple)) else []


def place(t):
    "Where a tensor lies: two tensors of the same place are the same numbers"
    return t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()


def refusal(func, args):
    "Why an operation cannot be recorded, None where it can"
    name = str(func).rpartition('.')[0]
    if name in REFUSED: return f'{REFUSED[name]} ({name})'
    if name == 'aten.index' and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return f'{SHAPE} (aten.index with a mask)'


class Tape(TorchDispatchMode):
    "Notes operations while it is active, and what the memory held that they found"
    def __init__(self):
        super().__init__()
        self.ops = []       # (operation, arguments, keyword arguments, result)
        self.found = {}     # address of a memory to a tensor in it and what it held, None where the step made it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (why := refusal(func, args)): raise CannotRecord(why)
        kwargs = kwargs or {}
        for t in tensors([args, list(kwargs.values())]):
            if t.untyped_storage().data_ptr() not in self.found: self._note(t, t.untyped_storage().clone())
        out = func(*args, **kwargs)
        for t in tensors(out): self._note(t, None)
        self.ops.append((func, args, kwargs, out))
        return out

    def _note(self, t, held): self.found.setdefault(t.untyped_storage().data_ptr(), (t, held))

    def undo(self):
        "Put back what the memory held"
        for t,held in self.found.values():
            if held is not None: t.untyped_storage().copy_(held)


class TapeRecording:
    "A recording for the CPU, operation by operation"
    def __init__(self, generators=()):
        self.tape,self.generators = Tape(),[torch.default_generator, *generators]

    def record(self, step):
        "Note a step; where that fails, memory and random states are as before"
        states = [g.get_state() for g in self.generators]
        try:
            with self.tape: step()
        except BaseException:
            self.tape.undo()
            for g,s in zip(self.generators, states): g.set_state(s)
            raise
        self.todo = [entry for op in self.tape.ops if (entry := self._entry(*op))]
        self.done = True        # unlike a CUDA graph, recording has executed the step

    def _entry(self, func, args, kwargs, out):
        "An operation, and the results that it must write; None for a view, which lies where it lay"
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns): return None
        given = {place(t) for t in tensors([args, list(kwargs.values())])}      # written in place already
        return func, args, kwargs, [t if t.numel() and place(t) not in given else None for t in tensors(out)]

    def replay(self):
        "Do all operations again; the first time only counts the step that was recorded"
        if self.done: self.done = False; return
        with torch.no_grad():
            for func,args,kwargs,out in self.todo:
                for old,new in zip(out, tensors(func(*args, **kwargs))):
                    if old is not None: old.copy_(new)
