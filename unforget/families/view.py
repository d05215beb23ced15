"""What libraries see of a model folder: the files that were looked at, and nothing else that lies there."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unforget.families.parts import INDEX, Classes, listed
from unforget.families.safety import check_tables
from unforget.files.storage import read_json


@contextmanager
def view(
    folder: Path, pipeline: Any, allowed: Classes, *, pickled: bool = False, given: Collection[str] = ()
) -> Iterator[Path]:
    """A folder of links with the parts of a pipeline's class that may be loaded, for as long as they are.

    So the file that is read is the file that was checked: weights lie under the one name that is read, configurations
    are those that were parsed, and adapters, code, variants and what else a library may look for are not there. Weights
    of parts that are `given` are left out; those that are pickled are there if `pickled` and there are no others.
    """
    index = read_json(folder / INDEX)
    _, options = pipeline._get_signature_keys(pipeline)
    said = {n: index[n] for n in options if n in index} | {"_class_name": pipeline.__name__}
    with TemporaryDirectory(prefix="unforget-") as scratch:
        for part in (p for p in listed(folder, allowed) if p.loaded):
            said[part.name] = [part.library, part.class_name]
            home = Path(scratch) / part.name
            home.mkdir()
            tables = check_tables(part)
            weights = {} if part.name in given else part.weights() or (part.weights(pickled=True) if pickled else {})
            for name, file in [*((f.name, f) for f in part.files()), *weights.items()]:
                if name in tables:
                    (home / name).write_text(
                        json.dumps({k: v for k, v in tables[name].items() if not k.endswith("_file")})
                    )
                else:
                    (home / name).symlink_to(file.resolve())
        (Path(scratch) / INDEX).write_text(json.dumps(said))
        yield Path(scratch)
