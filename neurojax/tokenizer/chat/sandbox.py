"""A Jinja environment for untrusted chat templates, with bounded steps, text and time.

A template comes with a model from anybody. Jinja's sandbox keeps it from Python's internals and from
changing its arguments. This one also keeps it from using up the machine: every pass of a loop and every
call is counted, every text or list that an operator, filter or call makes is charged before or when it
is made, and a render ends after `MAX_SECONDS` of processor time.
"""

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

MAX_STEPS = 500_000
MAX_SECONDS = 10.0
_BASE_SIZE = 16_000_000
# Templates may copy what they are given a few hundred times.
_SIZE_PER_CHARACTER = 400
_MAX_COUNT = 1_000_000
_MAX_WIDTH = 10_000
_MAX_BITS = 100_000
# "%99999d" and "%*d" in the old style of formatting, "{:99999}" and "{:{}}" in the new one.
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(:[^{}]*\d{5}|\{)")

SecurityError = jinja2.sandbox.SecurityError


class Budget:
  """The steps, text and time that one render may still use."""

  def __init__(self, given: int):
    self._steps = MAX_STEPS
    self._size = _BASE_SIZE + _SIZE_PER_CHARACTER * given
    self._end = time.thread_time() + MAX_SECONDS

  def step(self) -> None:
    self._steps -= 1
    if self._steps < 0:
      raise SecurityError(f"more than {MAX_STEPS} steps are unsafe")
    if self._steps % 16 == 0 and time.thread_time() > self._end:
      raise SecurityError(f"more than {MAX_SECONDS:g} seconds are unsafe")

  def charge(self, size: int) -> None:
    self._size -= size
    if self._size < 0:
      raise SecurityError("making so much text is unsafe")


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def bounded(*given: object) -> Iterator[None]:
  """Gives the code inside one budget, which grows with the text that a template is given."""
  token = _budget.set(Budget(_weight(given)))
  try:
    yield
  finally:
    _budget.reset(token)


def plain(value: object) -> Any:
  """Returns the same data in JSON's types alone, so that a template meets no methods but theirs.

  Raises: ValueError: a value has no such type.
  """
  if value is None or type(value) in (str, int, float, bool):
    return value
  for kind in (str, int, float):
    if isinstance(value, kind):
      return kind(value)
  if isinstance(value, Mapping):
    return {plain(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  raise ValueError(
    f"a value of type {type(value).__name__} in the messages: give text, numbers, lists and tables"
  )


def _weight(value: object) -> int:
  if isinstance(value, str):
    return len(value)
  if isinstance(value, Mapping):
    return sum(_weight(key) + _weight(item) + 1 for key, item in value.items())
  if isinstance(value, list | tuple):
    return sum(_weight(item) + 1 for item in value)
  return 1


def _charged(value: Any) -> Any:
  """Charges a value's length to the budget and returns the value."""
  if isinstance(value, str | bytes | list | tuple | dict | set | frozenset):
    _budget.get().charge(len(value))
  elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
    raise SecurityError(f"a number of more than {_MAX_BITS} bits is unsafe")
  return value


class _Counted:
  """The items of a loop; each pass is a step."""

  def __init__(self, items: Iterable):
    self._items = items

  def __iter__(self) -> Iterator:
    step = _budget.get().step
    for item in self._items:
      step()
      yield item


class _CountedSized(_Counted):
  def __len__(self) -> int:
    return len(self._items)


class _Generator(jinja2.compiler.CodeGenerator):
  """Jinja's code generator, which also shows the sandbox texts that are made without a call."""

  def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
    self.write("environment.join_texts((")
    for part in node.nodes:
      self.visit(part, frame)
      self.write(", ")
    self.write("))")

  def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Any) -> None:
    if not isinstance(node.arg, jinja2.nodes.Slice):
      return super().visit_Getitem(node, frame)
    self.write("environment.charged(")
    super().visit_Getitem(node, frame)
    self.write(")")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The environment of templates. It renders and compiles within `bounded` only."""

  intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})
  code_generator_class = _Generator
  charged = staticmethod(_charged)

  def __init__(self, **options: Any):
    super().__init__(**options)
    del self.globals["lipsum"]
    self.globals["namespace"] = _Namespace
    self.globals["dict"] = dict
    self.filters = {name: _measured(name, call) for name, call in self.filters.items()}
    self.filters["counted"] = _counted

  def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
    tree = super()._parse(source, name, filename)
    for loop in list(tree.find_all(jinja2.nodes.For)):
      loop.iter = jinja2.nodes.Filter(
        loop.iter, "counted", [], [], None, None, lineno=loop.lineno, environment=self
      )
    return tree

  def add_filter(self, name: str, call: Callable) -> None:
    self.filters[name] = _measured(name, call)

  @staticmethod
  def concat(parts: Iterable[str]) -> str:
    budget, kept = _budget.get(), []
    for part in parts:
      budget.charge(len(part) + 1)
      kept.append(part)
    return "".join(kept)

  @staticmethod
  def join_texts(parts: Sequence[object]) -> str:
    return _charged("".join(map(str, parts)))

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    # A text may be made a table of replacements of any length.
    return attr not in ("translate", "maketrans") and super().is_safe_attribute(obj, attr, value)

  def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
    # Jinja's own answer is an undefined value, which prints as nothing.
    raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

  def wrap_str_format(self, value: Any) -> Any:
    call = super().wrap_str_format(value)
    if call is None:
      return None
    source = value.__self__

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> str:
      if _WIDE_BRACES.search(source):
        raise SecurityError("formatting to a large or computed width is unsafe")
      # Each field may show any of the arguments.
      shown = sum(_shown(arg) for arg in (*args, *kwargs.values()))
      _budget.get().charge(source.count("{") * shown)
      return call(*args, **kwargs)

    return checked

  def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    _budget.get().step()
    if isinstance(obj, jinja2.runtime.LoopContext) and args:
      # A loop that calls itself.
      args = (_counted(args[0]), *args[1:])
    owner = getattr(obj, "__self__", None)
    if isinstance(owner, str | bytes):
      _foresee(obj.__name__, owner, (*args, *kwargs.values()))
    return _charged(super().call(context, obj, *args, **kwargs))

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "*":
      for repeated, times in ((left, right), (right, left)):
        countable = isinstance(times, int) and isinstance(repeated, Sequence)
        if countable and len(repeated) * times > _MAX_COUNT:
          raise SecurityError(f"repetition to more than {_MAX_COUNT} items is unsafe")
    elif operator == "**" and isinstance(right, int) and isinstance(left, int):
      if left.bit_length() * abs(right) > _MAX_BITS:
        raise SecurityError(f"power of {str(right)[:12]} is unsafe")
    elif operator == "%" and isinstance(left, str):
      _foresee_percent(left, right)
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
      _budget.get().charge(len(left) + len(right))
    return _charged(super().call_binop(context, operator, left, right))


class _Namespace(jinja2.utils.Namespace):
  """Jinja's namespace, without names that begin with an underscore."""

  def __init__(*args: Any, **kwargs: Any):
    self, args = args[0], args[1:]
    values = dict(*args, **kwargs)
    for name in values:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: object) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise SecurityError(f"the name {name!r} in a namespace is unsafe")


def _counted(items: Any) -> Iterable:
  # Text, lists and tables have a length, which a loop may ask for; a generator's is found by Jinja.
  return _CountedSized(items) if isinstance(items, Sized) else _Counted(items)


def _measured(name: str, call: Callable) -> Callable:
  """Wraps a filter so that its results are charged. Keeps Jinja's marks on the function."""
  marked = getattr(call, "jinja_pass_arg", None) is not None

  @functools.wraps(call)
  def measured(*args: Any, **kwargs: Any) -> Any:
    budget = _budget.get()
    budget.step()
    given = args[1:] if marked else args
    if given:
      _foresee(name, given[0], (*given[1:], *kwargs.values()))
    made = call(*args, **kwargs)
    if isinstance(made, Iterator):
      return iter(_Counted(made))
    return _charged(made)

  return measured


def _foresee(name: str, value: Any, arguments: tuple) -> None:
  """Refuses a method or filter whose result would be large, before it is made.

  Raises: SecurityError.
  """
  budget = _budget.get()
  if isinstance(value, str | bytes):
    # To look at a text takes a little time.
    budget.charge(len(value) // 16)
  texts = [arg for arg in arguments if isinstance(arg, str | bytes)]
  if name in _WIDTHS:
    if any(isinstance(arg, int) and arg > _MAX_WIDTH for arg in arguments):
      raise SecurityError(f"{name} to more than {_MAX_WIDTH} is unsafe")
    widest = max([arg for arg in arguments if isinstance(arg, int)] + [len(t) for t in texts] + [8])
    lines = 1
    if isinstance(value, str):
      lines += value.count("\t" if name == "expandtabs" else "\n")
      lines += len(value) if name == "wordwrap" else 0
    budget.charge(widest * lines if name not in ("batch", "slice", "tojson") else widest)
    if name == "tojson":
      budget.charge(widest * _weight(value) if len(arguments) else 0)
  elif name == "replace" and isinstance(value, str) and len(texts) >= 2:
    found = value.count(texts[0]) if texts[0] else len(value) + 1
    budget.charge(found * len(texts[1]))
  elif name == "join":
    separated, separator = (
      (arguments[:1], value) if isinstance(value, str | bytes) else ([value], "")
    )
    count = max([len(item) for item in separated if isinstance(item, Sized)] + [1])
    budget.charge(count * (len(separator) + sum(map(len, texts))))
  elif name == "format" and isinstance(value, str):
    _foresee_percent(value, arguments)


_WIDTHS = frozenset(
  {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap",
   "tojson", "truncate", "round", "to_bytes"}
)  # fmt: skip


def _foresee_percent(pattern: str, arguments: Any) -> None:
  if _WIDE_PERCENT.search(pattern):
    raise SecurityError("formatting to a large width is unsafe")
  shown = arguments if isinstance(arguments, tuple | list) else (arguments,)
  count = pattern.count("%")
  _budget.get().charge(len(pattern) + sum(_shown(arg) for arg in shown) * (count if count else 1))


def _shown(value: object) -> int:
  """Estimates how many characters a value's text has."""
  return 4 * _weight(value)
