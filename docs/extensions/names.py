"""The reference of names: links to them, their signatures, and what their pages leave out."""

import inspect
import sys
import typing

from docutils import nodes

LAYERS = (
    "cldsde.linear",
    "cldsde.score",
    "cldsde.solvers",
    "cldsde.validation",
    "cldsde.pretrained",
)


def _public_reference(app, env, node, contnode):
    """Resolve a reference to a name in the layer that publishes it.

    ``cldsde.linear.processes.CLD``, as an annotation has it, and a bare ``CLD`` are both
    documented as ``cldsde.linear.CLD``.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    *path, name = target.split(".")
    # Every class also has an entry for the module that defines it.
    objects = {x for x, entry in env.domaindata["py"]["objects"].items() if not entry.aliased}
    if path == ["cldsde"]:
        found = [full for layer in LAYERS if (full := f"{layer}.{name}") in objects]
    elif path[:1] == ["cldsde"]:
        # cldsde.linear.sde.LinearSDE.drift: the class is published, the method goes with it
        found = [
            candidate
            for layer in (path[:2], ["cldsde", "solvers", "authoring"])
            for cut in range(2, len(path) + 1)
            if (candidate := ".".join([*layer, *path[cut:], name])) in objects
        ]
    else:
        found = [full for full in objects if full.endswith(f".{target}")]
        # `solve` is the function, not the method of that name of a class
        fewest = min((full.count(".") for full in found), default=0)
        found = [full for full in found if full.count(".") == fewest]
    if len(found) != 1:
        return None
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node.get("reftype", "obj"), found[0], node, contnode
    )


def _skip(app, what, name, obj, skip, options):
    """Leave out what a page of a class need not repeat.

    These are fields of named tuples, of which Python says their number only, and methods that
    implement a protocol: the class that declares the protocol describes them once.
    """
    if str(getattr(obj, "__doc__", "")).startswith("Alias for field number"):
        return True
    function = inspect.unwrap(getattr(obj, "fget", None) or getattr(obj, "__func__", obj))
    path = getattr(function, "__qualname__", "").split(".")
    owner = getattr(sys.modules.get(getattr(function, "__module__", "")), path[0], None)
    if len(path) != 2 or not inspect.isclass(owner):
        return skip
    protocols = [base for base in owner.__mro__[1:] if base.__module__.startswith("cldsde.")]
    return True if any(path[1] in vars(base) for base in protocols) else skip


def _readable(app, domain, kind, content):
    """Write constants in signatures as their formulas."""
    formulas = {"_CRITICAL_COUPLING": "2√2", "_CRITICAL_FRICTION": "3√3"}
    for text in list(content.parent[0].findall(nodes.Text)):
        if text in formulas:
            text.parent.replace(text, nodes.Text(formulas[text]))


def _plain_types(app, obj, bound_method):
    """Show the types of checked arguments without the ranges that `pydantic` checks."""
    function = inspect.unwrap(obj)
    if function is not obj:
        function.__annotations__ = obj.__annotations__ = typing.get_type_hints(function)


def setup(app):
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-before-process-signature", _plain_types)
    app.connect("object-description-transform", _readable)
    app.connect("missing-reference", _public_reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
