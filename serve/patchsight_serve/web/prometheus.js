// Prometheus' text format, as far as /metrics has it: numbers by name and labels, and what happened between two looks.

/** `[{name, labels, value}, …]` of a text. */
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const [, name, labels, value] = line.match(/^([a-z_:][\w:]*)(?:\{(.*)\})? (\S+)/i) ?? [];
    if (!name) continue; // a comment
    const pairs = [...(labels ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, text]) => [key, text]);
    found.push({ name, labels: Object.fromEntries(pairs), value: Number(value) });
  }
  return found;
}

/** The sum of all numbers of a name that are wanted. */
export function sum(samples, name, wanted = () => true) {
  return samples.reduce((total, s) => (s.name === name && wanted(s.labels) ? total + s.value : total), 0);
}

/** How much a counter grew from one look to the other. */
export const grown = (before, after, name, wanted) => sum(after, name, wanted) - sum(before, name, wanted);

/**
 * Below which seconds the share `q`, 0 to 1, of what a histogram counted between two looks was: null where it counted
 * nothing. As Prometheus does it, a bucket's counts are spread evenly over the bucket.
 */
export function quantile(before, after, name, q, wanted = () => true) {
  const edges = [...new Set(after.filter((s) => s.name === `${name}_bucket`).map((s) => s.labels.le))];
  const buckets = edges
    .map((le) => ({ le: le === "+Inf" ? Infinity : Number(le), count: grown(before, after, `${name}_bucket`, (l) => l.le === le && wanted(l)) }))
    .sort((a, b) => a.le - b.le);
  const total = buckets.at(-1)?.count ?? 0;
  if (!total) return null;
  const i = buckets.findIndex(({ count }) => count >= q * total);
  const low = i ? buckets[i - 1] : { le: 0, count: 0 };
  if (buckets[i].le === Infinity) return low.le;
  return low.le + ((buckets[i].le - low.le) * (q * total - low.count)) / (buckets[i].count - low.count || 1);
}
