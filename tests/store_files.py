"""A store that has what object stores have and no more, and that can fail; for tests, as the scheme ``flaky``."""

import io
import threading

import fsspec
from fsspec.spec import AbstractFileSystem


class Flaky(AbstractFileSystem):
    """Whole objects under names, in this process's memory: no rename, no appending, no local paths, folders only where
    there are objects. ``faults`` says of each request (its kind, the name, how often it was made before) what goes
    wrong: an exception, "cut" for half of the bytes and no error, or "killed" for the end of who writes, by then."""

    protocol, cachable = "flaky", False
    objects, requests, faults = {}, [], None
    lock = threading.Lock()

    @classmethod
    def clear(cls, faults=None):
        cls.objects.clear(), cls.requests.clear()
        cls.faults = staticmethod(faults) if faults else None

    def _content(self, kind, path, content):
        """What arrives of a request's bytes."""
        with self.lock:
            before = self.requests.count((kind, path))
            self.requests.append((kind, path))
        fault = self.faults(kind, path, before) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "killed":
            self.objects[path] = content[: len(content) // 2]
            raise KeyboardInterrupt
        return content[: len(content) // 2] if fault == "cut" else content

    def _stored(self, path):
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def info(self, path, **_):
        path = self._strip_protocol(path)
        self._content("info", path, b"")
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in list(self.objects)):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        self._content("ls", path, b"")
        inside = [name for name in list(self.objects) if name.startswith(f"{path}/")]
        if not inside:
            raise FileNotFoundError(path)
        files = [name for name in inside if "/" not in name.removeprefix(f"{path}/")]
        return [{"name": name, "size": len(self.objects[name]), "type": "file"} for name in files]

    def cat_file(self, path, start=None, end=None, **_):
        path = self._strip_protocol(path)
        return self._content("get", path, self._stored(path)[start:end])

    def get_file(self, rpath, lpath, **_):
        rpath = self._strip_protocol(rpath)
        with open(lpath, "wb") as file:
            file.write(self._content("get", rpath, self._stored(rpath)))

    def put_file(self, lpath, rpath, **_):
        rpath = self._strip_protocol(rpath)
        with open(lpath, "rb") as file:
            self.objects[rpath] = self._content("put", rpath, file.read())

    def _open(self, path, mode="rb", **_):
        if mode != "rb":
            raise NotImplementedError(f"{path}: objects are written whole")
        path = self._strip_protocol(path)
        return io.BytesIO(self._content("get", path, self._stored(path)))

    def rm_file(self, path):
        path = self._strip_protocol(path)
        self._content("rm", path, b"")
        self._stored(path)
        del self.objects[path]

    def mv(self, *_, **__):
        raise NotImplementedError("objects cannot be renamed")

    move = rename = cp_file = mv


fsspec.register_implementation("flaky", Flaky, clobber=True)


def contents(root):
    """Of a folder behind a ``flaky`` URL: name below it -> bytes."""
    prefix = str(root).removeprefix("flaky://") + "/"
    return {name.removeprefix(prefix): found for name, found in Flaky.objects.items() if name.startswith(prefix)}
