"""study.py OUT: tables and a picture of what study.sh has written to OUT, with nothing but Python itself.

The target is the highest of the best held-out losses of all trainings, which so all of them reach. Between two looks at the
held-out text a loss is taken as linear; a time is what the experts of all steps before take, as those that were sampled do."""
import collections
import csv
import math
import sys

COLOURS = {"topk": "#4477aa", "bias": "#66ccee", "noisy": "#228833", "switch": "#ccbb44", "gshard": "#ee6677",
           "base": "#aa3377", "swipe": "#bbbbbb", "topology": "#222222"}
PLAN = "ours"


def read(path):
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def reached(curve, target):
    """The step at which a curve of (step, loss) is first at target or below."""
    before = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def seconds_until(samples, step):
    """What all steps up to `step` take, if each takes as long as the next one that was sampled."""
    done, total = 0, 0.0
    for at, seconds in samples:
        part = max(0, min(at, step) - done)
        total += part * seconds
        done = max(done, min(at, step))
    return total + max(0, step - done) * samples[-1][1]


def panel(out, left, title, curves, low, high):
    width, height, top = 330, 330, 40
    most = max(point[0] for curve in curves.values() for point in curve)
    x = lambda value: left + value / most * width
    y = lambda value: top + (high - max(low, min(high, value))) / (high - low) * height
    out.append(f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">{title}</text>')
    for tick in range(0, 11):
        value = low + (high - low) * tick / 10
        out.append(f'<path d="M{left} {y(value):.1f} H{left + width}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    digit = 10 ** math.floor(math.log10(most / 5))
    apart = next(times * digit for times in (1, 2, 5, 10) if most <= 5 * times * digit)
    for tick in range(0, int(most / apart) + 1):
        value = apart * tick
        out.append(f'<text x="{x(value):.1f}" y="{top + height + 18}" text-anchor="middle">{value:.4g}</text>')
    for gate, curve in curves.items():
        points = " ".join(f"{x(at):.1f},{y(loss):.1f}" for at, loss in curve if loss <= high)
        out.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS.get(gate, "#000")}" stroke-width="1.8"/>')


def main(folder):
    rows = read(f"{folder}/study-loss.csv")
    runs = collections.defaultdict(lambda: collections.defaultdict(list))
    balance = collections.defaultdict(list)
    for row in rows:
        runs[row["gate"]][row["seed"]].append((int(row["step"]), float(row["held_out_loss"])))
    for gate, seeds in runs.items():
        for seed in seeds:
            # The second half of the training.
            loads = [float(r["balance"]) for r in rows if r["gate"] == gate and r["seed"] == seed]
            balance[gate] += loads[len(loads) // 2:]
    samples = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in read(f"{folder}/study-time.csv"):
        for kind in ("predicted", "measured"):
            if row[kind + "_s"]:
                samples[row["link"], row["plan"], kind][row["gate"]].append((int(row["step"]), float(row[kind + "_s"])))
    target = max(min(loss for _, loss in curve) for seeds in runs.values() for curve in seeds.values())
    steps = {gate: [reached(curve, target) for curve in seeds.values()] for gate, seeds in runs.items()}

    print(f"\nTarget: a held-out loss of {target:.3f} nats. Mean over seeds (least to most).\n")
    print("| gate | held-out loss at the end | fullest expert over the mean | steps to the target | of GShard's | of BASE's |")
    print("|---|---|---|---|---|---|")

    def ratio(values, other):
        return f"{mean(values[0]) / mean(values[1][other]):.2f}" if other in values[1] else "-"

    for gate, seeds in runs.items():
        ends = [curve[-1][1] for curve in seeds.values()]
        print(f"| {gate} | {mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f}) | {mean(balance[gate]):.2f} "
              f"| {mean(steps[gate]):.0f} ({min(steps[gate]):.0f} to {max(steps[gate]):.0f}) "
              f"| {ratio((steps[gate], steps), 'gshard')} | {ratio((steps[gate], steps), 'base')} |")

    links = list(dict.fromkeys(link for link, _, _ in samples))
    for link in links:
        print(f"\n{link}/s: the experts' time a step in ms, without shadows and as planned, and to the target, as planned; "
              "predicted / measured.\n")
        print("| gate | without shadows | as planned | seconds to the target | of GShard's | of BASE's |")
        print("|---|---|---|---|---|---|")
        until = {kind: {gate: [seconds_until(of, step) for step in steps[gate]]
                        for gate, of in samples[link, PLAN, kind].items()} for kind in ("predicted", "measured")}
        for gate in runs:
            def pair(make):
                return " / ".join(make(kind) for kind in ("predicted", "measured"))

            def each(plan):
                return pair(lambda kind: f"{1e3 * mean(s for _, s in samples[link, plan, kind][gate]):.1f}")

            print(f"| {gate} | {each('no shadow')} | {each(PLAN)} "
                  f"| {pair(lambda kind: f'{mean(until[kind][gate]):.1f}')} "
                  f"| {pair(lambda kind: ratio((until[kind][gate], until[kind]), 'gshard'))} "
                  f"| {pair(lambda kind: ratio((until[kind][gate], until[kind]), 'base'))} |")

    curves = {gate: [(step, mean(curve[at][1] for curve in seeds.values()))
                     for at, (step, _) in enumerate(next(iter(seeds.values())))] for gate, seeds in runs.items()}
    panels = [("steps", curves)]
    for kind in ("predicted", "measured"):
        of = samples[links[-1], PLAN, kind] if links else {}
        if of:
            panels.append((f"{kind} seconds of experts, {links[-1]}/s",
                           {gate: [(seconds_until(of[gate], step), loss) for step, loss in curve]
                            for gate, curve in curves.items()}))
    low = min(loss for curve in curves.values() for _, loss in curve)
    high = max(mean(loss for _, loss in curve[:3]) for curve in curves.values())
    out = []
    for number, (title, of) in enumerate(panels):
        panel(out, 60 + number * 400, title, of, low - 0.02, high)
    width = 60 + len(panels) * 400 + 60
    out.append(f'<text transform="translate(14 205) rotate(-90)" text-anchor="middle">held-out loss, nats a character</text>')
    for number, gate in enumerate(curves):
        at = 60 + len(panels) * 400 - 45
        out.append(f'<path d="M{at} {50 + 22 * number} h18" stroke="{COLOURS.get(gate, "#000")}" stroke-width="3"/>'
                   f'<text x="{at + 24}" y="{54 + 22 * number}">{gate}</text>')
    with open(f"{folder}/study.svg", "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="430" font-family="sans-serif" '
                   f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(out)}</svg>\n')


main(sys.argv[1])
