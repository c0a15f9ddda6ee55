"""Tells the forms of a file's matrices from its header."""

from neurojax.config import Span
from neurojax.files.model_file import ModelFile
from neurojax.forms import Form, Grouped, Scales
from neurojax.model import params


def stored_forms(file: ModelFile) -> dict[str, Form]:
  """The forms of the file's matrices by canonical name.

  A matrix is listed if one form holds it exactly in all layers, with at most 16 bits a number.
  """
  config = file.config
  places = {name: [None] for name, _ in params.outer_names(config, Span.whole(config))}
  for stack in params.stacks(config):
    for name, _ in params.stack_names(config, stack):
      places.setdefault(name, []).extend(stack.layers)
  found = {}
  for name, layers in places.items():
    if params.is_matrix(name):
      form = _joined({file.narrow_form(name, layer) for layer in layers})
      if form is not None:
        found[name] = form
  return found


def ternary_matrices(file: ModelFile) -> dict[str, Scales]:
  """The ternary ones of `stored_forms`."""
  return {name: form for name, form in stored_forms(file).items() if isinstance(form, Scales)}


def _joined(forms: set[Form | None]) -> Form | None:
  joined, *others = forms
  for form in others:
    if not isinstance(joined, Grouped) or not isinstance(form, Grouped):
      return None
    joined = joined.join(form)
  return joined
