"""lanes: a timeline as a picture.

    python3 lanes.py TRACE.json OUT.svg

Draws the lanes of fmoe_pass_write_timeline's file, measured and predicted, from the beginning of forward on.
"""
import json
import sys
from html import escape

COLOURS = {"S": "#4477aa", "R": "#66ccee", "C": "#228833", "W": "#ccbb44", "fetch": "#aa3377", "reduce": "#ee6677"}
WIDTH, LEFT, LANE = 1000, 210, 20

with open(sys.argv[1]) as file:
    events = json.load(file)["traceEvents"]
processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
pieces = [e for e in events if e["ph"] == "X"]
start = min(p["ts"] for p in pieces if p["name"] == "forward")
end = max(p["ts"] + p["dur"] for p in pieces)
scale = (WIDTH - LEFT - 10) / (end - start)

out, y, last = [], 10, None
for pid, tid in sorted(lanes):
    if pid != last:
        y += 8
        out.append(f'<text x="4" y="{y + 13}" font-weight="bold">{escape(processes[pid])}</text>')
        y += LANE
        last = pid
    out.append(f'<text x="4" y="{y + 13}">{escape(lanes[pid, tid])}</text>')
    for p in pieces:
        if (p["pid"], p["tid"]) != (pid, tid) or p["ts"] + p["dur"] <= start:
            continue
        x, width = LEFT + (max(p["ts"], start) - start) * scale, p["dur"] * scale
        colour = COLOURS.get(p["name"].split()[0], "#bbbbbb")
        out.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{LANE - 4}" fill="{colour}" stroke="white"'
            f' stroke-width="0.4"><title>{escape(p["name"])}, {p["dur"] / 1e3:.2f} ms</title></rect>')
        if width > 7.2 * len(p["name"]):
            out.append(f'<text x="{x + 3:.1f}" y="{y + 12}" fill="white" font-size="11">{escape(p["name"])}</text>')
    y += LANE
step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s * 1e3 * scale > 60)
for tick in range(0, int((end - start) / 1e3) + 1, step):
    x = LEFT + tick * 1e3 * scale
    out.insert(0, f'<path d="M{x:.1f} 10 V{y}" stroke="#ddd"/>')
    out.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{tick} ms</text>')
with open(sys.argv[2], "w") as file:
    file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" font-family="sans-serif"'
               f' font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n")
