"""Reading a pickle as data: a small interpreter of the pickle opcodes that imports nothing and calls nothing.

The standard unpickler with a restricted ``find_class`` still runs constructors, ``__setstate__`` and ``setattr`` of
allowed classes, and reserves memory for any memo index that a file claims. Here a global is only a name, a call only a
record of its arguments (`PickledCall`), and the caller builds real objects from the finished tree after checking it.

Source: the opcode table of the Python standard library's ``pickletools``, protocols 2 to 5 as far as plain data need.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from shardwise.errors import FormatError, UnsafePickleError

_UNSAFE_HINT = (
    "It is not loaded, because unpickling it could run code. If you trust whoever wrote it, load it yourself and save "
    "it again in another format."
)
_DAMAGED = "The file is damaged or forged: restore it from a copy."
_MAX_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """A class, function or constant that a pickle names; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class PickledCall:
    """An object that a pickle makes by calling ``function``, and the state that it then gives to it."""

    function: PickledGlobal
    args: tuple[object, ...]
    state: object = None


@dataclass(frozen=True, slots=True)
class PickledReference:
    """Something outside of the pickle that it refers to by ``key``, such as a storage of ``torch.save``."""

    key: object


#: Torch's dtypes by their names.
TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_SETS = ("set", "frozenset")
_NAMES = {"collections": ("OrderedDict",), "builtins": _SETS, "__builtin__": _SETS, "torch": ("Size", *TORCH_DTYPES)}
#: What plain values of torch name: containers, sizes and dtypes.
PLAIN_GLOBALS = frozenset(PickledGlobal(module, name) for module, group in _NAMES.items() for name in group)


_MARK = object()
_UNHASHABLE_AS_KEY = (list, dict, set, tuple, frozenset)


def read_pickle_tree(
    data: bytes,
    allowed: Collection[PickledGlobal],
    path: str,
    enums: Collection[PickledGlobal] = (),
    *,
    torch_file: bool = False,
) -> object:
    """Return what a pickle, which may name the globals ``allowed``, holds: containers, `PickledGlobal`, `PickledCall`.

    Time and memory are linear in ``len(data)``. Containers may be shared or contain themselves; the caller has to look
    out for that. Of ``enums`` it may name members too: Python calls such a class with the member's value, and Python
    3.11.0 to 3.11.3 asks for the attribute of the member's name: a `PickledCall` with either. A ``torch_file`` may
    refer to what is outside of it (`PickledReference`), and attributes of an ``OrderedDict`` are dropped, such as the
    ``_metadata`` that ``state_dict()`` adds.

    Raises:
        UnsafePickleError: It names another global, or uses an opcode that plain data do not need.
        FormatError: It is malformed.
    """
    try:
        return _Machine(data, frozenset(allowed), path, frozenset(enums), torch_file).run()
    except (IndexError, struct.error) as error:
        raise FormatError(f"the pickle {path!r} ends early or is malformed", path=path, hint=_DAMAGED) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"the pickle {path!r} holds text that is not UTF-8", path=path, hint=_DAMAGED) from error


@dataclass(eq=False)
class _Machine:
    _data: bytes
    _allowed: frozenset[PickledGlobal]
    _path: str
    _enums: frozenset[PickledGlobal]
    _torch_file: bool
    _at: int = 0
    _uncalled: int = 0
    _stack: list[object] = field(default_factory=list)
    _memo: dict[int, object] = field(default_factory=dict)

    def run(self) -> object:
        handlers, data = self._table(), self._data
        while True:
            opcode = data[self._at]
            self._at += 1
            if opcode == 0x2E:
                break
            if opcode not in handlers:
                raise UnsafePickleError(
                    f"the pickle {self._path!r} uses the opcode {bytes([opcode])!r} at byte {self._at - 1}, which "
                    "plain data do not need",
                    path=self._path,
                    hint=_UNSAFE_HINT,
                )
            handlers[opcode]()
        if self._uncalled:
            self._refuse(_GETATTR[0])
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            self._fail("does not end with one value")
        return self._stack[0]

    def _table(self) -> dict[int, Callable[[], object]]:
        push = self._stack.append
        table: dict[bytes, Callable[[], object]] = {
            b"\x80": self._protocol,
            b"\x95": lambda: self._take(8),
            b"(": lambda: push(_MARK),
            b"0": self._stack.pop,
            b"1": self._to_mark,
            b"N": lambda: push(None),
            b"\x88": lambda: push(True),
            b"\x89": lambda: push(False),
            b"K": lambda: push(self._take(1)[0]),
            b"M": lambda: push(int.from_bytes(self._take(2), "little")),
            b"J": lambda: push(int.from_bytes(self._take(4), "little", signed=True)),
            b"\x8a": lambda: push(int.from_bytes(self._counted(1), "little", signed=True)),
            b"G": lambda: push(struct.unpack(">d", self._take(8))[0]),
            b"\x8c": lambda: push(self._counted(1).decode("utf-8")),
            b"X": lambda: push(self._counted(4).decode("utf-8")),
            b"\x8d": lambda: push(self._counted(8).decode("utf-8")),
            b"C": lambda: push(self._counted(1)),
            b"B": lambda: push(self._counted(4)),
            b")": lambda: push(()),
            b"]": lambda: push([]),
            b"}": lambda: push({}),
            b"\x8f": lambda: push(set()),
            b"t": lambda: push(tuple(self._to_mark())),
            b"\x85": lambda: self._tuple(1),
            b"\x86": lambda: self._tuple(2),
            b"\x87": lambda: self._tuple(3),
            b"a": lambda: self._extend([self._pop()]),
            b"e": lambda: self._extend(self._to_mark()),
            b"s": lambda: self._set_items([self._pop(), self._pop()][::-1]),
            b"u": lambda: self._set_items(self._to_mark()),
            b"\x90": lambda: self._add(self._to_mark()),
            b"\x91": lambda: push(frozenset(self._keys(self._to_mark()))),
            b"\x94": lambda: self._remember(len(self._memo)),
            b"q": lambda: self._remember(self._take(1)[0]),
            b"r": lambda: self._remember(int.from_bytes(self._take(4), "little")),
            b"h": lambda: self._recall(self._take(1)[0]),
            b"j": lambda: self._recall(int.from_bytes(self._take(4), "little")),
            b"c": lambda: self._name(self._line(), self._line()),
            b"\x93": self._stack_global,
            b"R": self._call,
            b"\x81": self._call,
            b"b": self._build,
        }
        if self._torch_file:
            table[b"Q"] = lambda: push(PickledReference(self._pop()))
        return {code[0]: handler for code, handler in table.items()}

    def _fail(self, reason: str) -> NoReturn:
        raise FormatError(f"the pickle {self._path!r} {reason}", path=self._path, hint=_DAMAGED)

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            self._fail("is truncated")
        self._at += count
        return part

    def _counted(self, width: int) -> bytes:
        return self._take(int.from_bytes(self._take(width), "little"))

    def _protocol(self) -> None:
        version = self._take(1)[0]
        if version > _MAX_PROTOCOL:
            self._fail(f"has the unknown protocol {version}")

    def _pop(self) -> object:
        value = self._stack.pop()
        if value is _MARK:
            self._fail("takes a value where none is")
        return value

    def _to_mark(self) -> list[object]:
        stack = self._stack
        at = len(stack) - 1
        while at >= 0 and stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self._fail("closes a group that it never opened")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _tuple(self, count: int) -> None:
        stack = self._stack
        items = tuple(stack[-count:])
        if len(items) != count or _MARK in items:
            self._fail("takes a value where none is")
        stack[-count:] = [items]

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            self._fail("appends to something that is not a list")
        target.extend(items)

    def _keys(self, keys: list[object]) -> list[object]:
        # Hashing a deeply nested tuple recurses without a guard, so no container serves as a key.
        if any(isinstance(key, _UNHASHABLE_AS_KEY) for key in keys):
            self._fail("uses a container as a key")
        if len(keys) > 100 and 2 * len({hash(key) for key in keys}) < len(keys):
            self._fail("has keys that were chosen to collide")
        return keys

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            self._fail("sets items of something that is not a dict")
        target.update(zip(self._keys(items[::2]), items[1::2], strict=True))

    def _add(self, items: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            self._fail("adds to something that is not a set")
        target.update(self._keys(items))

    def _remember(self, slot: int) -> None:
        value = self._stack[-1]
        if value is _MARK:
            self._fail("remembers a value where none is")
        self._memo[slot] = value

    def _recall(self, slot: int) -> None:
        if slot not in self._memo:
            self._fail("recalls a value that it never stored")
        self._push_named(self._memo[slot])

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at) if b"\n" in self._data[self._at : self._at + 1024] else -1
        if end < 0:
            self._fail("names a global in a malformed way")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end + 1
        return text

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(module) is not str or type(name) is not str:
            self._fail("names a global in a malformed way")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        found = PickledGlobal(module, name)
        if found not in self._allowed and not (found in _GETATTR and (self._enums or self._torch_file)):
            self._refuse(found)
        self._push_named(found)

    def _push_named(self, value: object) -> None:
        # Named and then called, each time: as a value by itself it has no place in the tree.
        # The name is looked at first: a large file names things a million times.
        if type(value) is PickledGlobal and value.name == "getattr":
            self._uncalled += value in _GETATTR
        self._stack.append(value)

    def _refuse(self, found: PickledGlobal) -> NoReturn:
        raise UnsafePickleError(
            f"the pickle {self._path!r} names {str(found)[:200]!r}, which is not on the list of what it may name",
            path=self._path,
            hint=_UNSAFE_HINT,
        )

    def _call(self) -> None:
        args, function = self._pop(), self._pop()
        if type(function) is not PickledGlobal or type(args) is not tuple:
            self._fail("calls something that is not a global")
        if function.name == "getattr" and function in _GETATTR:
            self._stack.append(self._member(function, args))
        elif function.module in _PLAIN_MODULES:
            self._stack.append(self._plain(function, args))
        else:
            self._stack.append(PickledCall(function, args))

    def _member(self, function: PickledGlobal, args: tuple[object, ...]) -> PickledCall | PickledGlobal:
        """A member of an enumeration, or a class inside of a class: the only allowed uses of ``getattr``."""
        enum, name = args if len(args) == 2 else (None, None)
        if self._torch_file and isinstance(enum, PickledGlobal) and type(name) is str:
            nested = PickledGlobal(enum.module, f"{enum.name}.{name}")
            if nested in self._allowed:
                self._uncalled -= 1
                return nested
        if not isinstance(enum, PickledGlobal) or enum not in self._enums or type(name) is not str:
            self._refuse(function)
        self._uncalled -= 1
        return PickledCall(enum, (name,))

    def _plain(self, function: PickledGlobal, args: tuple[object, ...]) -> object:
        # Containers become real at once, because later opcodes fill them.
        if function.name == "OrderedDict" and not args:
            return {}
        items = args[0] if len(args) == 1 else []
        if function.name == "OrderedDict" or len(args) > 1 or type(items) is not list:
            self._fail(f"calls {function} with arguments that it never has")
        return set(self._keys(items)) if function.name == "set" else frozenset(self._keys(items))

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if self._torch_file and type(target) is dict and type(state) is dict:
            return
        if type(target) is not PickledCall or target.state is not None:
            self._fail("gives a state to something that takes none")
        target.state = state


_GETATTR = (PickledGlobal("builtins", "getattr"), PickledGlobal("__builtin__", "getattr"))
_PLAIN_MODULES = frozenset({"collections", "builtins", "__builtin__"})
