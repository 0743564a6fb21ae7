"""Which names in a pickle no model needs and an attack does: a file that uses one is refused.

Owns the line between the two kinds of names that hive does not know. A class of the user or of a library
(`mymodel.Net`) is a record: named, never loaded. A name of Python's own library is refused unless it stands for plain
data (`collections.OrderedDict`, `datetime.date`, `argparse.Namespace`): through the others a pickle reaches a shell,
files, the network or code. So are functions of libraries that load or run something (`torch.load`), and every path by
attributes to such a module (`anything.os.system`, `Net.__globals__`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

from coordinator.identify.pickle_values import Global
from protos.errors import ErrorCode, SpecError
from protos.printable import printable

RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names
_LIBRARY = sys.stdlib_module_names | {  # with what older Pythons had
    "asynchat", "asyncore", "cPickle", "cgi", "commands", "crypt", "distutils", "httplib", "imp", "lib2to3",
    "nntplib", "pipes", "popen2", "smtpd", "telnetlib", "urllib2",
}  # fmt: skip
_RUNNERS = frozenset({  # packages that are there to run or fetch something
    "IPython", "paramiko", "pexpect", "pip", "pkg_resources", "ptyprocess", "requests", "setuptools",
})  # fmt: skip
_LOADERS = (  # of libraries that models do use, with all below them
    "torch.load", "torch.hub", "torch.serialization.load", "torch.jit.load", "torch.utils.cpp_extension",
    "torch.utils.model_zoo", "torch.multiprocessing.spawn", "numpy.load", "numpy.lib.npyio.load", "numpy.distutils",
    "numpy.f2py", "numpy.testing", "joblib.load", "joblib.numpy_pickle.load", "pandas.read_pickle", "pandas.eval",
    "pandas.io.pickle", "pandas.core.computation", "dill.loads", "dill.load", "cloudpickle.loads", "cloudpickle.load",
)  # fmt: skip
_MODULES = frozenset({  # whoever has one of these as an attribute has everything
    "bltns", "builtins", "ctypes", "importlib", "nt", "os", "pickle", "posix", "pty", "runpy", "shutil", "socket",
    "subprocess", "sys",
})  # fmt: skip
_DUNDER = re.compile(r"__\w+__")


def _class_like(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _one_of(*names: str) -> Callable[[str], bool]:
    return frozenset(names).__contains__


def _operator(name: str) -> bool:
    return not name.startswith("_") and name not in ("methodcaller", "call")


def _builtin(name: str) -> bool:
    return _class_like(name) or name in _BUILTINS


_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "enumerate", "float", "frozenset", "int", "iter", "list", "object",
    "range", "reversed", "set", "slice", "str", "tuple", "type", "zip", "long", "unicode", "xrange",
    "classmethod", "function", "method", "property", "staticmethod", "super",
    "abs", "all", "any", "divmod", "hash", "isinstance", "len", "max", "min", "pow", "round", "sorted", "sum",
    "getattr",  # of bound methods and nested classes; what it reaches is judged where it is called
})  # fmt: skip
_PLAIN: Mapping[str, Callable[[str], bool]] = {  # of Python's library: names of data, and of what makes data
    "builtins": _builtin,
    "copyreg": _one_of("_reconstructor", "__newobj__", "__newobj_ex__"),
    "_codecs": _one_of("encode"),
    "codecs": _one_of("encode"),
    "collections": lambda name: _class_like(name) or name in ("defaultdict", "deque"),
    "_collections_abc": _class_like,
    "abc": _class_like,
    "argparse": _one_of("Namespace"),
    "array": _one_of("array", "_array_reconstructor"),
    "contextlib": _one_of("nullcontext"),
    "dataclasses": _class_like,
    "datetime": _one_of("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": _class_like,
    "enum": _class_like,
    "fractions": _class_like,
    "functools": _one_of("partial"),
    "inspect": _one_of("Parameter", "Signature", "_ParameterKind", "_empty"),
    "_io": _one_of("BytesIO", "StringIO"),
    "io": _one_of("BytesIO", "StringIO"),
    "ipaddress": _class_like,
    "itertools": _one_of("chain", "count", "cycle", "islice", "repeat"),
    "json": _class_like,
    "logging": _one_of("Logger", "RootLogger", "getLogger"),
    "math": str.isalnum,
    "numbers": _class_like,
    "_operator": _operator,
    "operator": _operator,
    "pathlib": _class_like,
    "random": _one_of("Random"),
    "re": _one_of("_compile", "compile", "RegexFlag"),
    "statistics": _class_like,
    "string": _class_like,
    "time": _one_of("struct_time"),
    "types": _one_of("GenericAlias", "MappingProxyType", "NoneType", "SimpleNamespace", "UnionType"),
    "typing": _class_like,
    "uuid": _class_like,
    "zoneinfo": _one_of("ZoneInfo", "ZoneInfo._unpickle"),
}


class HarmfulPickle(SpecError):
    """A pickle that was refused for what it names, not for damage."""


def harmful(what: str) -> HarmfulPickle:
    return HarmfulPickle(
        f"the file names {printable(what[:120])}, which no model needs and which could run code when the file is "
        "loaded; it was read as data, nothing was executed",
        "do not load this file; ask whoever made it for the weights alone, as safetensors",
        code=ErrorCode.MODEL_UNUSABLE,
    )


def check_name(module: str, name: str) -> None:
    """Raises HarmfulPickle for a name that a file of a model has no use for."""
    module = RENAMED.get(module, module)
    if _is_harmful(module, name):
        raise harmful(f"{module}.{name}")


def check_attribute(name: str) -> None:
    """The same of an attribute that the pickle takes of a value."""
    if any(map(_reaches, name.split("."))):
        raise harmful(f"the attribute {name}")


def check_call_of(made: Global) -> None:
    """The same of calling what calling `made` gave: an attribute of a value, a function with its arguments."""
    if made.module.partition(".")[0] in _LIBRARY:
        raise harmful(f"a call of what {made} gives")


def _is_harmful(module: str, name: str) -> bool:
    root, _, below = module.partition(".")
    if root in _LIBRARY:
        plain = _PLAIN.get(root)
        inner = below.lstrip("_")  # classes of pathlib._local, json.encoder, collections.abc
        dotted = "." in name and name != "ZoneInfo._unpickle"
        return plain is None or dotted or not (plain(name) if not inner else _class_like(name))
    full = f"{module}.{name}"
    if root in _RUNNERS or any(f"{full}.".startswith(f"{loader}.") for loader in _LOADERS):
        return True
    parts = name.split(".")
    return all(map(str.isidentifier, parts)) and any(map(_reaches, parts))  # another name cannot be found


def _reaches(part: str) -> bool:
    """Whether an attribute of that name leads out of a class: to its module's names, or to another module."""
    return part.lstrip("_") in _MODULES or _DUNDER.fullmatch(part) is not None
