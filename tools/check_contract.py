"""What the library asks of a model or a direction getter, held by reading the code.

Only `dwiml_nb/batch/spec.py` reads what a model says of itself. Everywhere else a model or a getter is called by the methods listed there
(`MODEL_METHODS`, `GETTER_METHODS`) and not probed with getattr, hasattr, inspect or type. An expression counts as a model or a getter when it
is called so (`model`, `self.model`, `walk.model`, `self.direction_getter`, …) or was assigned from one.
"""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "dwiml_nb" / "batch" / "spec.py"
NAMES = {"model", "getter", "direction_getter"}
PROBES = {"getattr", "hasattr", "type", "vars", "dir"}


def written_list():
    "The methods that spec.py lists."
    found = set()
    for node in ast.parse(SPEC.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("MODEL_METHODS", "GETTER_METHODS"): found |= set(ast.literal_eval(node.value))
    return found


class Probes(ast.NodeVisitor):
    "Collects what a module asks of models beyond the written list."
    def __init__(self, allowed): self.allowed, self.aliases, self.problems = allowed, [set()], []

    def is_model(self, node):
        if isinstance(node, ast.Name): return node.id in NAMES or any(node.id in names for names in self.aliases)
        return isinstance(node, ast.Attribute) and node.attr in NAMES

    def visit_FunctionDef(self, node):
        self.aliases.append(set())
        for item in ast.walk(node): self.learn(item)
        self.generic_visit(node)
        self.aliases.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def learn(self, node):
        "`m = self.model`, `for m in (model, again)`: m is a model too."
        pairs = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts)
                pairs += list(zip(target.elts, node.value.elts)) if both else [(target, node.value)]
        elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, (ast.Tuple, ast.List)):
            pairs += [(node.target, value) for value in node.iter.elts]
        elif isinstance(node, ast.NamedExpr): pairs.append((node.target, node.value))
        self.aliases[-1] |= {target.id for target, value in pairs if isinstance(target, ast.Name) and self.is_model(value)}

    def complain(self, node, what): self.problems.append((node.lineno, what))

    def visit_Call(self, node):
        asked = [arg.value if isinstance(arg, ast.Attribute) and not self.is_model(arg) else arg for arg in node.args]
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in PROBES and node.args and self.is_model(node.args[0]): self.complain(node, f"asks {name}({ast.unparse(node.args[0])}, …)")
        if ast.unparse(node.func).startswith("inspect.") and any(map(self.is_model, asked)): self.complain(node, f"inspects {ast.unparse(node.args[0])}")
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if self.is_model(node.value) and node.attr not in self.allowed: self.complain(node, f"reads {ast.unparse(node)}")
        self.generic_visit(node)


def probes(source, allowed):
    "[(line, what)] that a module's source asks of models beyond the written list."
    visitor = Probes(allowed)
    visitor.visit(ast.parse(source))
    return sorted(set(visitor.problems))


def contract_problems():
    "One sentence for each place that asks a model more than the written list."
    allowed, problems = written_list(), []
    for file in sorted((ROOT / "dwiml_nb").rglob("*.py")):
        if file == SPEC or file.name == "_modidx.py": continue
        for line, what in probes(file.read_text(encoding="utf-8"), allowed):
            problems.append(f"{file.relative_to(ROOT)}:{line} {what}: only batch.spec reads a model. Ask the spec, or add the method to its list")
    return problems


if __name__ == "__main__":
    found = contract_problems()
    print(*found, sep="\n")
    sys.exit(bool(found))
