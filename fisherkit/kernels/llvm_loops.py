"""Inner loops in LLVM's language: the same bits as kernels.prune and pairs.blend, in one pass; and counting.

Each loop takes LANES stored entries at a time through registers: no passes over buffers, and no jumps but for the few
vectors that hold a candidate. The text is made for one type of entries and one metric, and LLVM turns it into
instructions of the processor at hand. Nothing is reordered or fused that could change a bit; sums of squares are taken
in float64. Standard library only; kernels.compiled compiles and calls.

Blocks are of at most 2**31 entries, or places would not fit. Names: ``ours`` and ``theirs`` are vectors of stored bits
of BASE and FT, ``w`` and ``d`` float32 vectors of weights and deltas, ``s`` of scores. A count is a vector of int32,
one lane for each place modulo LANES.
"""

import struct
from collections.abc import Mapping

LANES = 8
ROW = 256
"""Entries of a row of ``row_sums``."""
KEEP, BLEND, SUMS, COUNT = "keep", "blend", "row_sums", "count"
TABLES = 4
"""Tables of ``count``, and numbers of a word."""
METRICS = ("fapm", "relative", "magnitude")
_BITS = {"BF16": 16, "F16": 16, "F32": 32}
_INFINITE = 0x7F800000
_FLOATS, _DOUBLES, _INTS, _FLAGS = (f"<{LANES} x {kind}>" for kind in ("float", "double", "i32", "i1"))


class _Text:
    """Lines of a function's body; calling it with an instruction returns the name of what that gives."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, instruction: str) -> str:
        name = f"%t{len(self.lines)}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, *lines: str) -> None:
        """Add lines that give nothing; labels end in a colon."""
        self.lines += [line if line.endswith(":") else f"  {line}" for line in lines]

    def all_lanes(self, scalar: str) -> str:
        """Return a vector of a float, such as an argument."""
        lane = self(f"insertelement {_FLOATS} poison, float {scalar}, i32 0")
        return self(f"shufflevector {_FLOATS} {lane}, {_FLOATS} poison, {_INTS} zeroinitializer")

    def load(self, vector: str, array: str, at: str) -> tuple[str, str]:
        """Return a vector of ``array`` from entry ``at`` on, and its place."""
        place = self(f"getelementptr {_element(vector)}, ptr {array}, i64 {at}")
        return self(f"load {vector}, ptr {place}, align 1"), place

    def widened(self, code: str, stored: str) -> str:
        """Return the values of stored bits in float32."""
        if code == "F32":
            return self(f"bitcast {_INTS} {stored} to {_FLOATS}")
        bits = self(f"zext {_stored(code)} {stored} to {_INTS}")
        if code == "BF16":
            bits = self(f"shl {_INTS} {bits}, {_ints(16)}")
            return self(f"bitcast {_INTS} {bits} to {_FLOATS}")
        # float16: the exponent of a float32 is 112 higher; exact for subnormal numbers too
        size = self(f"and {_INTS} {bits}, {_ints(0x7FFF)}")
        size = self(f"shl {_INTS} {size}, {_ints(13)}")
        value = self(f"bitcast {_INTS} {size} to {_FLOATS}")
        value = self(f"fmul {_FLOATS} {value}, {_floats(2.0**112)}")
        is_finite = self(f"icmp ult {_INTS} {size}, {_ints(0x7C00 << 13)}")
        value = self(f"bitcast {_FLOATS} {value} to {_INTS}")
        infinite = self(f"or {_INTS} {size}, {_ints(_INFINITE)}")
        size = self(f"select {_FLAGS} {is_finite}, {_INTS} {value}, {_INTS} {infinite}")
        sign = self(f"and {_INTS} {bits}, {_ints(0x8000)}")
        sign = self(f"shl {_INTS} {sign}, {_ints(16)}")
        bits = self(f"or {_INTS} {size}, {sign}")
        return self(f"bitcast {_INTS} {bits} to {_FLOATS}")

    def narrowed(self, code: str, value: str) -> str:
        """Return float32 values rounded to bfloat16 or float32, as stored bits; NaN stays NaN."""
        bits = self(f"bitcast {_FLOATS} {value} to {_INTS}")
        if code == "F32":
            return bits
        upper = self(f"lshr {_INTS} {bits}, {_ints(16)}")
        odd = self(f"and {_INTS} {upper}, {_ints(1)}")
        half = self(f"add {_INTS} {odd}, {_ints(0x7FFF)}")
        rounded = self(f"add {_INTS} {bits}, {half}")
        rounded = self(f"lshr {_INTS} {rounded}, {_ints(16)}")
        nan = self(f"or {_INTS} {upper}, {_ints(0x40)}")
        is_nan = self(f"fcmp uno {_FLOATS} {value}, {value}")
        rounded = self(f"select {_FLAGS} {is_nan}, {_INTS} {nan}, {_INTS} {rounded}")
        return self(f"trunc {_INTS} {rounded} to {_stored(code)}")

    def magnitude(self, value: str) -> str:
        """Return float32 values without their signs."""
        bits = self(f"bitcast {_FLOATS} {value} to {_INTS}")
        bits = self(f"and {_INTS} {bits}, {_ints(0x7FFFFFFF)}")
        return self(f"bitcast {_INTS} {bits} to {_FLOATS}")

    def finite(self, d: str) -> tuple[str, str]:
        """Return deltas with zeros for what is not finite, and flags of that."""
        bits = self(f"bitcast {_FLOATS} {self.magnitude(d)} to {_INTS}")
        is_broken = self(f"icmp sge {_INTS} {bits}, {_ints(_INFINITE)}")
        return self.where(_FLOATS, is_broken, "zeroinitializer", d), is_broken

    def where(self, vector: str, flags: str, one: str, other: str) -> str:
        """Return one where a flag is set, the other elsewhere."""
        return self(f"select {_FLAGS} {flags}, {vector} {one}, {vector} {other}")

    def put(self, code: str, flags: str, new: str, old: str, place: str) -> None:
        """Store new bits where a flag is set, and old ones elsewhere.

        Not by select: LLVM would make a masked store of it, which AMD's processors are slow at.
        """
        stored = _stored(code)
        mask = self(f"sext {_FLAGS} {flags} to {stored}")
        change = self(f"xor {stored} {new}, {old}")
        change = self(f"and {stored} {change}, {mask}")
        bits = self(f"xor {stored} {change}, {old}")
        self.do(f"store {stored} {bits}, ptr {place}, align 1")

    def scores(self, metric: str, w: str, d: str, mean: str) -> str:
        """Return scores of magnitudes; see kernels.prune_scores.score."""
        if metric == "magnitude":
            return d
        if metric == "relative":
            ratio = self(f"fdiv {_FLOATS} {d}, {w}")
            return self(f"fneg {_FLOATS} {ratio}")
        ratio = self(f"fdiv {_FLOATS} {mean}, {w}")
        factor = self(f"fsub {_FLOATS} {_floats(1.0)}, {ratio}")
        return self(f"fmul {_FLOATS} {factor}, {d}")

    def claims(self, metric: str, s: str, no_delta: str, no_weight: str) -> str:
        """Return scores with -inf where there is no claim; see kernels.prune_scores.exclude_ineligible."""
        lowest, none = _floats(-float.fromhex("0x1.fffffep127")), _floats(float("-inf"))
        is_higher = self(f"fcmp ogt {_FLOATS} {s}, {lowest}")
        s = self.where(_FLOATS, is_higher, s, lowest)
        out = no_delta if metric == "magnitude" else self(f"or {_FLAGS} {no_delta}, {no_weight}")
        return self.where(_FLOATS, out, none, s)

    def loop(self, totals: Mapping[str, str]) -> None:
        """Begin a loop over %vectors vectors, ``%at`` being the first entry of each.

        Args:
            totals: types by name. ``%x`` is a total before the vector at hand; ``next`` gives the one after it.
        """
        self.do(f"%size = mul i64 %vectors, {LANES}", "%is_empty = icmp eq i64 %vectors, 0")
        self.do("br i1 %is_empty, label %done, label %loop", "loop:")
        for name, kind in {"at": "i64", **totals}.items():
            self.do(f"%{name} = phi {kind} [{_zero(kind)}, %entry], [%{name}.next, %latch]")

    def next(self, name: str, instruction: str) -> None:
        """Say what a total is after the vector at hand."""
        self.do(f"%{name}.next = {instruction}")

    def count(self, name: str, flags: str) -> None:
        """Add flags to a count: a set one is -1."""
        ones = self(f"sext {_FLAGS} {flags} to {_INTS}")
        self.next(name, f"sub {_INTS} %{name}, {ones}")

    def add_squares(self, name: str, value: str) -> None:
        """Add squares of float32 values to a sum in float64."""
        wide = self(f"fpext {_FLOATS} {value} to {_DOUBLES}")
        square = self(f"fmul {_DOUBLES} {wide}, {wide}")
        self.next(name, f"fadd {_DOUBLES} %{name}, {square}")

    def end(self, totals: Mapping[str, str]) -> None:
        """End the loop and the function; int64 totals go to %counts, those in float64 to %sums, in their order."""
        self.do("br label %latch", "latch:", f"%at.next = add i64 %at, {LANES}")
        self.do("%more = icmp ult i64 %at.next, %size", "br i1 %more, label %loop, label %done", "done:")
        for name, kind in totals.items():
            self.do(f"%{name}.end = phi {kind} [{_zero(kind)}, %entry], [%{name}.next, %latch]")
        for kind, array in ((_INTS, "counts"), ("i64", "counts"), (_DOUBLES, "sums")):
            for name in (name for name, its in totals.items() if its == kind):
                self._store_total(f"%{name}.end", kind, f"%{array}", list(totals).index(name))
        self.do("ret void")

    def _store_total(self, total: str, kind: str, array: str, number: int) -> None:
        if kind == _INTS:
            lanes = self(f"call i32 @llvm.vector.reduce.add.v{LANES}i32({_INTS} {total})")
            total, kind = self(f"zext i32 {lanes} to i64"), "i64"
        if kind == _DOUBLES:
            start = "double 0.0"
            total = self(f"call reassoc double @llvm.vector.reduce.fadd.v{LANES}f64({start}, {_DOUBLES} {total})")
            kind = "double"
        place = self(f"getelementptr {kind}, ptr {array}, i64 {number}")
        self.do(f"store {kind} {total}, ptr {place}")


def keep(code: str, metric: str) -> str:
    """Return a module with the loop of kernels.prune.keep_block.

    ``keep(base, tuned, vectors, mean, low, high, is_open, writes, places, scores, deltas, counts, sums)``: ``base`` and
    ``tuned`` hold LANES * vectors entries; with ``is_open`` entries without a claim could score as high as ``low``;
    int32 ``places``, float32 ``scores`` and ``deltas`` (magnitudes) get those of the candidates. int64 ``counts`` get
    entries kept, without change, zero in the base, not finite, and the number of candidates; float64 ``sums``, from its
    sixth place on, those of all squared deltas and of the kept ones.
    """
    totals = dict.fromkeys(("kept", "no_delta", "no_weight", "broken"), _INTS)
    totals |= {"found": "i64", "energy": _DOUBLES, "energy_kept": _DOUBLES}
    text, stored = _Text(), _stored(code)
    text.do("entry:", f"%scores_here = alloca {_FLOATS}", f"%deltas_here = alloca {_FLOATS}")
    mean, low, high = (text.all_lanes(name) for name in ("%mean", "%low", "%high"))
    text.do("%opens = icmp ne i64 %is_open, 0", "%stores = icmp ne i64 %writes, 0")
    text.loop(totals)
    ours, place = text.load(stored, "%base", "%at")
    theirs, _ = text.load(stored, "%tuned", "%at")
    w, f = text.widened(code, ours), text.widened(code, theirs)
    d, is_broken = text.finite(text(f"fsub {_FLOATS} {f}, {w}"))
    w, d = text.magnitude(w), text.magnitude(d)
    no_delta = text(f"fcmp oeq {_FLOATS} {d}, zeroinitializer")
    no_weight = text(f"fcmp oeq {_FLOATS} {w}, zeroinitializer")
    s = text.scores(metric, w, d, mean)
    claims = text.claims(metric, s, no_delta, no_weight)
    s = text(f"select i1 %opens, {_FLOATS} {claims}, {_FLOATS} {s}")
    is_above = text(f"fcmp ogt {_FLOATS} {s}, {high}")
    is_high, is_low = text(f"fcmp oge {_FLOATS} {s}, {low}"), text(f"fcmp ole {_FLOATS} {s}, {high}")
    inside = text(f"and {_FLAGS} {is_high}, {is_low}")
    for name, flags in zip(totals, (is_above, no_delta, no_weight, is_broken), strict=False):
        text.count(name, flags)
    text.add_squares("energy", d)
    text.add_squares("energy_kept", text.where(_FLOATS, is_above, d, "zeroinitializer"))
    text.do("br i1 %stores, label %store, label %look", "store:")
    text.put(code, is_above, theirs, ours, place)
    text.do("br label %look", "look:")
    _list_candidates(text, inside, {"scores": s, "deltas": d})
    text.end(totals)
    arguments = "ptr noalias %base, ptr noalias %tuned, i64 %vectors, float %mean, float %low, float %high, "
    arguments += "i64 %is_open, i64 %writes, ptr noalias %places, ptr noalias %scores, ptr noalias %deltas, "
    return _module(KEEP, arguments + "ptr %counts, ptr %sums", text)


def _list_candidates(text: _Text, inside: str, values: Mapping[str, str]) -> None:
    """List the flagged entries of a vector one by one, lowest first; most vectors have none.

    Args:
        text: of the loop.
        inside: flags.
        values: float32 vectors by the array that gets their entries.
    """
    bits, some = f"i{LANES}", text(f"bitcast {_FLAGS} {inside} to i{LANES}")
    text.do(f"%is_any = icmp ne {bits} {some}, 0", "br i1 %is_any, label %list, label %listed_all", "list:")
    text.do(*(f"store {_FLOATS} {vector}, ptr %{array}_here" for array, vector in values.items()))
    text.do("br label %one", "one:")
    text.do(f"%left = phi {bits} [{some}, %list], [%left.next, %one]")
    text.do("%number = phi i64 [%found, %list], [%number.next, %one]")
    lane = text(f"call {bits} @llvm.cttz.{bits}({bits} %left, i1 true)")
    lane = text(f"zext {bits} {lane} to i64")
    place = text(f"trunc i64 {text(f'add i64 %at, {lane}')} to i32")
    text.do(f"store i32 {place}, ptr {text('getelementptr i32, ptr %places, i64 %number')}")
    for array in values:
        value = text(f"load float, ptr {text(f'getelementptr float, ptr %{array}_here, i64 {lane}')}")
        text.do(f"store float {value}, ptr {text(f'getelementptr float, ptr %{array}, i64 %number')}")
    text.do(
        "%number.next = add i64 %number, 1", f"%lower = sub {bits} %left, 1", f"%left.next = and {bits} %left, %lower"
    )
    text.do(f"%is_last = icmp eq {bits} %left.next, 0", "br i1 %is_last, label %listed_all, label %one", "listed_all:")
    text.next("found", "phi i64 [%found, %look], [%number.next, %one]")


def blend(code: str, masks: bool, scales: bool) -> str:
    """Return a module with the loop of pairs.blend, for bfloat16 or float32.

    ``blend(base, tuned, vectors, scale, mask, counts, sums)``: bool ``mask`` is looked at if it ``masks``, ``scale`` if
    it ``scales``. int64 ``counts`` get entries that differ from the base's, those without change before, not finite,
    and with a delta at the end; float64 ``sums``, from its fifth place on, squared deltas before and at the end.
    """
    totals = dict.fromkeys(("kept", "no_delta", "broken", "with_delta"), _INTS)
    totals |= {"energy": _DOUBLES, "energy_kept": _DOUBLES}
    text, stored = _Text(), _stored(code)
    text.do("entry:")
    scale = text.all_lanes("%scale")
    text.loop(totals)
    ours, place = text.load(stored, "%base", "%at")
    theirs, _ = text.load(stored, "%tuned", "%at")
    w, f = text.widened(code, ours), text.widened(code, theirs)
    d, is_broken = text.finite(text(f"fsub {_FLOATS} {f}, {w}"))
    text.count("no_delta", text(f"fcmp oeq {_FLOATS} {d}, zeroinitializer"))
    text.count("broken", is_broken)
    text.add_squares("energy", d)
    if masks:
        flags, _ = text.load(f"<{LANES} x i8>", "%mask", "%at")
        flags = text(f"icmp ne <{LANES} x i8> {flags}, zeroinitializer")
        d = text.where(_FLOATS, flags, d, "zeroinitializer")
    if scales:
        d = text(f"fmul {_FLOATS} {d}, {scale}")
        new = text.narrowed(code, text(f"fadd {_FLOATS} {w}, {d}"))
        is_changed = text(f"fcmp une {_FLOATS} {text.widened(code, new)}, {w}")
    else:
        new, is_changed = theirs, text(f"fcmp une {_FLOATS} {d}, zeroinitializer")
    text.count("kept", is_changed)
    text.count("with_delta", text(f"fcmp une {_FLOATS} {d}, zeroinitializer"))
    text.add_squares("energy_kept", d)
    text.put(code, is_changed, new, ours, place)
    text.end(totals)
    arguments = "ptr noalias %base, ptr noalias %tuned, i64 %vectors, float %scale, ptr noalias %mask, "
    return _module(BLEND, arguments + "ptr %counts, ptr %sums", text)


def row_sums(code: str) -> str:
    """Return a module that adds up magnitudes by row, in float32 and in the order of numpy's own sums.

    ``row_sums(stored, vectors, rows)``: sums of ROW entries each go to float32 ``rows``; vectors is ROW / LANES for
    each. numpy takes halves of 128 entries, 8 lanes in each.
    """
    text = _Text()
    text.do("entry:", "%is_empty = icmp eq i64 %vectors, 0", "br i1 %is_empty, label %done, label %row", "row:")
    text.do("%row_at = phi i64 [0, %entry], [%row_at.next, %row]")
    halves = [_half_row(text, code, start) for start in range(0, ROW, ROW // 2)]
    number = text(f"udiv i64 %row_at, {ROW}")
    text.do(
        f"store float {text(f'fadd float {halves[0]}, {halves[1]}')}, ptr "
        f"{text(f'getelementptr float, ptr %rows, i64 {number}')}"
    )
    text.do(f"%size = mul i64 %vectors, {LANES}", f"%row_at.next = add i64 %row_at, {ROW}")
    text.do("%more = icmp ult i64 %row_at.next, %size", "br i1 %more, label %row, label %done", "done:", "ret void")
    return _module(SUMS, "ptr noalias %stored, i64 %vectors, ptr noalias %rows", text)


def _half_row(text: _Text, code: str, start: int) -> str:
    """Sum of the magnitudes of half a row, by eight lanes."""
    total = ""
    for step in range(start, start + ROW // 2, LANES):
        stored, _ = text.load(_stored(code), "%stored", text(f"add i64 %row_at, {step}"))
        some = text.magnitude(text.widened(code, stored))
        total = text(f"fadd {_FLOATS} {total}, {some}") if total else some
    parts = [text(f"extractelement {_FLOATS} {total}, i32 {lane}") for lane in range(LANES)]
    while len(parts) > 1:
        parts = [text(f"fadd float {a}, {b}") for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def count() -> str:
    """Return a module that counts 16-bit numbers.

    ``count(numbers, words, tables)``: int32 ``tables`` [TABLES, 65536] are added to, for TABLES numbers in each 64-bit
    word. Neighbours go to different tables: one that is equal would have to wait for the other.
    """
    text = _Text()
    text.do("entry:", "%is_empty = icmp eq i64 %words, 0", "br i1 %is_empty, label %done, label %loop", "loop:")
    text.do("%at = phi i64 [0, %entry], [%at.next, %loop]")
    word = text(f"load i64, ptr {text('getelementptr i64, ptr %numbers, i64 %at')}, align 1")
    for table in range(TABLES):
        number = text(f"and i64 {text(f'lshr i64 {word}, {16 * table}')}, 65535")
        place = text(f"getelementptr i32, ptr %tables, i64 {text(f'add i64 {number}, {table << 16}')}")
        so_far = text(f"load i32, ptr {place}")
        text.do(f"store i32 {text(f'add i32 {so_far}, 1')}, ptr {place}")
    text.do("%at.next = add i64 %at, 1", "%more = icmp ult i64 %at.next, %words")
    text.do("br i1 %more, label %loop, label %done", "done:", "ret void")
    return _module(COUNT, "ptr noalias %numbers, i64 %words, ptr noalias %tables", text)


def _module(name: str, arguments: str, text: _Text) -> str:
    declared = [
        f"declare i32 @llvm.vector.reduce.add.v{LANES}i32({_INTS})",
        f"declare double @llvm.vector.reduce.fadd.v{LANES}f64(double, {_DOUBLES})",
        f"declare i{LANES} @llvm.cttz.i{LANES}(i{LANES}, i1)",
    ]
    return "\n".join([*declared, f"define void @{name}({arguments}) {{", *text.lines, "}", ""])


def _stored(code: str) -> str:
    """Vector type of stored bits."""
    return f"<{LANES} x i{_BITS[code]}>"


def _element(vector: str) -> str:
    return vector.removesuffix(">").rpartition(" ")[2]


def _ints(value: int) -> str:
    """Return a constant in all lanes."""
    return "<" + ", ".join([f"i32 {value}"] * LANES) + ">"


def _floats(value: float) -> str:
    """Return a float32 in all lanes; LLVM writes it as the bits of a float64."""
    bits = struct.unpack(">Q", struct.pack(">d", value))[0]
    return "<" + ", ".join([f"float 0x{bits:016X}"] * LANES) + ">"


def _zero(kind: str) -> str:
    return "0" if kind == "i64" else "zeroinitializer"
