"""Mutation testing: change one operator or number of a module at a time and see whether its tests notice.

    python -m benchmarks.mutants                         # every module, 60 mutants each, drawn with a fixed seed
    python -m benchmarks.mutants common/post/rle.py --sample 0      # all mutants of one module

Mutants come from cosmic-ray. The tests are collected once; each mutant then gets a forked process that executes the
changed source in the module, so no file is touched. Numba's compiler is off, the fastest tests run first, and the first
failure or a test that takes far longer than usual ends the process. Tests that need `CXR_REAL_DATA` or more than
SLOWEST seconds are left out. `mutants.txt` lists the survivors that no test can or should kill: module ("*" for all),
reason, and the line of code before and after, separated by " | ", with "…" for any text.
"""

import argparse
import contextlib
import os
import pickle
import random
import re
import resource
import signal
import sys
import time
from inspect import isclass, isfunction
from pathlib import Path

os.environ |= {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
os.environ.pop("CXR_REAL_DATA", None)

import hypothesis
import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

POST, METRICS, SUBMIT = "tests/common/post/test_", "tests/common/metrics/test_", "tests/common/submit/test_"
FUSION, DETECTION = (POST + "fusion.py", POST + "fusion_tables.py"), METRICS + "detection.py"
TESTS = {  # module → its tests, where they are not tests/<module's folder>/test_<module>.py alone
    "common/post/batches.py": FUSION,
    "common/post/boxes.py": (POST + "boxes.py", *FUSION, DETECTION),
    "common/post/fusion.py": FUSION,
    "common/post/rle.py": (POST + "rle.py", SUBMIT + "validate.py"),
    "common/post/suppression.py": FUSION,
    "common/post/wbf.py": FUSION,
    "common/metrics/statistics.py": (METRICS + "statistics.py", METRICS + "delong.py"),
    "common/metrics/detection.py": (DETECTION, METRICS + "detection_errors.py"),
    "common/submit/boxes.py": (SUBMIT + "boxes.py", SUBMIT + "validate.py"),
    "solutions/vinbigdata/postprocess.py": tuple(
        f"tests/solutions/vinbigdata/test_{name}.py" for name in ("postprocess", "tuning", "tools_foreign")
    ),
    "solutions/lung_segmentation/postprocess.py": tuple(
        f"tests/solutions/lung_segmentation/test_{name}.py" for name in ("postprocess", "scoring")
    ),
}
FOLDERS = ("common/post", "common/metrics", "common/submit")
MODULES = sorted(
    [str(p) for folder in FOLDERS for p in Path(folder).glob("*.py") if p.name != "__init__.py"]
    + ["common/tuning.py", "common/data/folds.py", *map(str, Path("solutions").glob("*/postprocess.py"))]
)
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr BitXor_BitOr"
COMPARISON = "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
OPERATORS = [
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Invert", "Not")),
    *("NumberReplacer", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr"),
    *("ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    "ExceptionReplacer",
]
SLOWEST = 1.5  # CPU seconds of a test, without the compiler
KNOWN = Path(__file__).with_suffix(".txt")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="module")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="test the mutants listed in mutants.txt too")
    args = parser.parse_args(argv)
    known = [] if args.all else [line.split(" | ", 2) for line in KNOWN.read_text().splitlines()]
    for module in args.modules:
        test_module(module, [text for name, _, text in known if name in ("*", module)], args.sample, args.seed)


def test_module(module, known, sample, seed):
    """Print the survivors of a module and its figures."""
    tests = TESTS.get(module, (f"tests/{Path(module).parent}/test_{Path(module).name}",))
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=["explicit", "generate"])
    hypothesis.settings.load_profile("mutants")  # a failure is not made smaller
    mutants = list_mutants(Path(module).read_text())
    random.Random(seed).shuffle(mutants)
    plugin = Mutation(module, mutants[: sample or None], known)
    pytest.main(["-s", "-qq", "--no-header", "--no-summary", "-p", "no:cacheprovider", *tests], [plugin])


class DropKeyword(Operator):
    """Leave out a keyword argument, such as an option that is not passed on."""

    def mutation_positions(self, node):
        if node.type == "argument" and node.children[1] == "=":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return parso.parse(f"{node.get_first_leaf().prefix}**{{}}")

    @classmethod
    def examples(cls):
        return ()


class Mutation:
    """Run the collected tests of a module once for each mutant, each time in a process of its own."""

    def __init__(self, module, mutants, known):
        self.module, self.mutants, self.known = module, mutants, known

    def pytest_runtestloop(self, session):
        source, begin = Path(self.module).read_text(), time.perf_counter()
        _, usual = self.run(source, session.items, {})
        failed = [item.nodeid for item in session.items if usual.get(item.nodeid) is None]
        if failed:
            names = ", ".join(name.rpartition("::")[2] for name in failed)
            print(f"{self.module}: left out, since they are slow or fail without a mutant: {names}")
        items = [item for item in session.items if usual.get(item.nodeid) is not None]
        items.sort(key=lambda item: usual[item.nodeid])
        killed = listed = 0
        for line, operator, mutant in self.mutants:
            pairs = zip(source.splitlines(), mutant.splitlines(), strict=False)
            change = next(f"{a.strip()} -> {b.strip()}" for a, b in pairs if a != b)
            if any(re.fullmatch(".*".join(map(re.escape, text.split("…"))), change) for text in self.known):
                listed += 1
            elif self.run(mutant, items, usual)[0]:
                killed += 1
            else:
                print(f"{self.module}:{line} | {operator} | {change}", flush=True)
        counted, took = len(self.mutants) - listed, time.perf_counter() - begin
        share = killed / max(1, counted)
        print(f"{self.module}: {killed} of {counted} killed ({share:.1%}), {listed} listed, {took:.0f} s", flush=True)
        return True

    def run(self, source, items, usual):
        """Return (whether a test failed, {test: CPU seconds, None if it failed}) of one version of the module."""
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            with open(reader, "rb") as file:
                content = file.read()
            return os.waitpid(child, 0)[1] != 0, pickle.loads(content) if content else {}
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        durations = {}
        try:
            replace_module(self.module, source)
            for item, following in zip(items, [*items[1:], None], strict=True):
                begin, before = time.process_time(), item.session.testsfailed
                if usual:  # the signal of the timer ends the process
                    signal.setitimer(signal.ITIMER_PROF, 1 + 4 * usual[item.nodeid])
                else:
                    signal.signal(signal.SIGPROF, fail_slow_test)
                    signal.setitimer(signal.ITIMER_PROF, SLOWEST)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                signal.setitimer(signal.ITIMER_PROF, 0)
                failed = item.session.testsfailed > before
                durations[item.nodeid] = None if failed else time.process_time() - begin
                if failed and usual:
                    os._exit(1)
            with open(writer, "wb") as file:
                pickle.dump(durations, file)
            os._exit(0)
        except BaseException:
            os._exit(2)


def fail_slow_test(*_):
    raise TimeoutError


def replace_module(path, source):
    """Execute `source` in an imported module and give the new objects to all modules that hold the old ones."""
    name = ".".join(Path(path).with_suffix("").parts)
    module = sys.modules[name]
    old = dict(vars(module))
    exec(compile(source, module.__file__, "exec"), vars(module))
    new = vars(module)
    for other in [m for n, m in sys.modules.items() if n.partition(".")[0] in ("common", "solutions", "tests")]:
        for key, value in list(vars(other).items()):
            if key in old and value is old[key] and other is not module:
                setattr(other, key, new[key])
    for key, value in old.items():
        if isfunction(value) and value.__module__ == name:
            swap(value, new[key])
        elif isclass(value) and value.__module__ == name:
            for method, function in vars(value).items():
                if isfunction(function):
                    swap(function, vars(new[key])[method])


def swap(function, other):
    if function.__code__.co_freevars == other.__code__.co_freevars:
        function.__code__ = other.__code__
    function.__defaults__, function.__kwdefaults__ = other.__defaults__, other.__kwdefaults__


def list_mutants(source):
    """Return (line, operator, changed source) of every mutant, one for each text."""
    nodes, found = list(ast_nodes(get_ast(source))), {}
    for operator in [DropKeyword(), *(get_operator(f"core/{name}")() for name in OPERATORS)]:
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for k, ((line, _), _) in enumerate(places):
            with contextlib.suppress(SyntaxError, AttributeError):  # `x in not y`; cosmic-ray and `except (A, b.C)`
                mutant = mutate_code(source, operator, k)
                compile(mutant, "mutant", "exec")
                if not source.splitlines()[line - 1].startswith("@"):  # options of the compiler and of dataclasses
                    found.setdefault(mutant, (line, type(operator).__name__, mutant))
    return list(found.values())


if __name__ == "__main__":
    main()
