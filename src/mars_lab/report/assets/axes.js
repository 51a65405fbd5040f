// Scales and tick labels: from data to pixels and back.

const SI = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function short(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  const [factor, unit] = SI.find(([f]) => size >= f * 0.99999) || [1, ""];
  return String(Number((value / factor).toPrecision(digits))) + unit;
}

function clock(seconds) {
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

function linearTicks([low, high], count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5].find((m) => m * power >= raw) || 10);
  const first = Math.ceil(low / step), last = Math.floor(high / step);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => (first + i) * step);
}

function logTicks([low, high], count) {
  for (const leads of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) {
      ticks.push(...leads.map((lead) => lead * 10 ** p).filter((x) => x >= low * 0.999 && x <= high * 1.001));
    }
    if (ticks.length >= 2 && ticks.length <= count + 2) return ticks;
  }
  return [low, Math.sqrt(low * high), high];
}

// A scale maps `range` to the pixels from `begin` to `end`, in equal steps or equal ratios.
class Scale {
  constructor(range, begin, end, isLog) {
    this.range = range;
    this.isLog = isLog;
    const f = isLog ? Math.log : (x) => x;
    const a = f(range[0]), slope = (end - begin) / (f(range[1]) - a || 1);
    this.pixel = (x) => begin + (f(x) - a) * slope;
    this.value = (pixel) => {
      const x = a + (pixel - begin) / slope;
      return isLog ? Math.exp(x) : x;
    };
  }
  ticks(count) {
    return this.isLog ? logTicks(this.range, count) : linearTicks(this.range, count);
  }
}
