"Rows of a measurement that is written down as it goes on, and that a second call takes up where nothing has changed"
import json
from pathlib import Path
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.files import file_hash, write_whole


class Rows(list):
    "Rows under a header that says what made them; rows of another header are refused, or dropped with `redo`"
    def __init__(self, out, script, redo=False, **header):
        self.out, code = out and Path(out), {**code_version(), 'script': file_hash(script)[:16]}
        self.header = json.loads(json.dumps(dict(header, code=code)))
        if not (out and self.out.is_file()) or redo: return
        was = json.loads(self.out.read_text())
        other = [k for k in self.header if k != 'code' and was.get(k) != self.header[k]]
        other += [f'code.{k}' for k in ('source', 'script') if was.get('code', {}).get(k) != code[k]]
        if other: raise SystemExit(f"{out} holds rows that were made otherwise ({', '.join(other)}): name another file, or pass --redo to measure all of them again.")
        self.extend(was['rows'])

    def add(self, **row):
        self.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items() if not isinstance(v, list)}, flush=True)
        if self.out: write_whole(self.out, json.dumps(dict(self.header, rows=self, environment=environment('cpu')), indent=1))
