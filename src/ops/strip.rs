//! Rows that are finished together: what [`super::by_rows`] and [`super::by_columns`] have in common.

use crate::array::{Offsets, Span, SpanMut};
use crate::kernels::finish::{APART, Plain, Terms, Tile, finish};
use crate::kernels::state::{Pair, Summand, Wide};
use crate::simd::{Isa, Kernel, Level, Vector};

use super::job::{Job, Kind, OUT, RESULT, UPSTREAM};
use super::plan::Path;
use super::stream::Spread;
use super::targets::NONE;

/// Rows that are worked on together.
pub(super) struct Strip<'j, 'a> {
    pub(super) job: &'j Job<'a>,
    pub(super) kept: &'j [usize],
    /// Whether the rows follow each other along the innermost row axis.
    pub(super) run: bool,
}

impl<'j, 'a> Strip<'j, 'a> {
    pub(super) fn new(job: &'j Job<'a>, kept: &'j [usize]) -> Self {
        let run = match kept {
            [first, .., last] => last - first + 1 == kept.len() && first % job.rows.inner_len() + kept.len() <= job.rows.inner_len(),
            _ => true,
        };
        Self { job, kept, run }
    }

    /// Whether `count` classes of the rows of an operand are one run of memory.
    pub(super) fn adjacent(&self, operand: usize, count: usize, size: usize) -> bool {
        let (classes, rows) = (&self.job.classes, &self.job.rows);
        self.run
            && count == classes.size
            && classes.inner_stride(operand) == size as isize
            && (self.kept.len() == 1 || rows.inner_stride(operand) == (count * size) as isize)
    }

    /// The byte offset of the first row of an operand, `shift` added, and those of the rows from there; the last one is repeated up to `count`.
    pub(super) fn offsets<'o>(&self, operand: usize, shift: isize, count: usize, offsets: &'o mut Offsets) -> (isize, &'o Offsets) {
        let (rows, kept) = (&self.job.rows, self.kept);
        let base = rows.offset(operand, kept[0]) + shift;
        if self.run {
            return (base, offsets.run(rows.inner_stride(operand), kept.len(), count));
        }
        let last = kept.len() - 1;
        (base, offsets.set((0..count.max(kept.len())).map(|i| rows.offset(operand, kept[i.min(last)]) + shift - base)))
    }

    /// The same as one long row if the rows are one run of memory, and the length of a row.
    pub(super) fn flat<'o>(
        &self,
        operand: usize,
        shift: isize,
        count: usize,
        size: usize,
        offsets: &'o mut Offsets,
    ) -> ((isize, &'o Offsets), usize) {
        if self.adjacent(operand, count, size) {
            ((self.job.rows.offset(operand, self.kept[0]), offsets.run(0, 1, 1)), self.kept.len() * count)
        } else {
            (self.offsets(operand, shift, 0, offsets), count)
        }
    }

    /// The sample weights of the rows to `weight`, and those and what comes from above to `g`.
    fn weigh_samples(&self, tile: &mut Tile) {
        let Self { job, kept, .. } = *self;
        let (weights, g) = (&mut tile.weight[..kept.len()], &mut tile.g[..kept.len()]);
        weights.fill(1.0);
        if job.weights.sampled() {
            weights.iter_mut().zip(kept).for_each(|(weight, &row)| *weight = job.weights.sample_weight(row));
        }
        g.iter_mut().zip(&*weights).for_each(|(g, weight)| *g = job.g * weight);
        if let Some(upstream) = job.upstream {
            let values = &mut tile.lse;
            self.runs(UPSTREAM, |offset, stride, slot, n| upstream.read(offset, stride, n, &mut values[slot..], 1));
            g.iter_mut().zip(&*values).for_each(|(g, value)| *g *= value);
        }
    }

    /// The same with the weights of the classes, where every row has one of all of its own.
    pub(super) fn weigh(&self, tile: &mut Tile) {
        let Self { job, kept, .. } = *self;
        self.weigh_samples(tile);
        if let (Some(labels), false) = (&job.labels, job.weight.is_empty()) {
            for ((weight, g), &row) in tile.weight.iter_mut().zip(&mut tile.g).zip(kept) {
                // What has no class is not counted.
                let w = job.weight.get(labels.class[row] as usize).copied().unwrap_or(0.0);
                (*weight, *g) = (*weight * w, *g * w);
            }
        }
    }

    /// Calls `run(operand offset, stride, slot, n)` for runs of rows of a row operand.
    pub(super) fn runs(&self, operand: usize, mut run: impl FnMut(isize, isize, usize, usize)) {
        let rows = &self.job.rows;
        if self.run && !self.kept.is_empty() {
            return run(rows.offset(operand, self.kept[0]), rows.inner_stride(operand), 0, self.kept.len());
        }
        for (slot, &row) in self.kept.iter().enumerate() {
            run(rows.offset(operand, row), 0, slot, 1);
        }
    }
}

/// The coefficients of a strip, and its losses, rounded to the type of the rows.
pub(super) struct Finish<'s> {
    pub(super) terms: &'s Terms,
    pub(super) tile: &'s mut Tile,
    /// The first of them and the one after the last.
    pub(super) rows: (usize, usize),
    pub(super) single: bool,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let (first, end) = self.rows;
        finish(isa, self.terms, self.tile, first, end);
        if self.terms.loss && self.single {
            let loss = SpanMut::of(&mut self.tile.loss);
            for j in (first..end).step_by(S::F32::LANES) {
                let rounded = <f32 as Summand>::load_wide(isa, loss.read(), j);
                <f32 as Summand>::store_wide(isa, rounded, loss, j);
            }
        }
    }
}

/// A sum of losses, strip by strip: in lanes whose number no level changes.
#[derive(Default)]
pub(super) struct Total {
    sums: [f64; Self::LANES],
    lost: [f64; Self::LANES],
}

impl Total {
    const LANES: usize = 8;

    /// Adds the losses of the first `n` rows; those of a few after them are overwritten.
    pub(super) fn add(&mut self, level: Level, loss: &mut [f64], n: usize) {
        let loss = &mut loss[..n.next_multiple_of(Self::LANES)];
        loss[n..].fill(0.0);
        level.run(Sum(self, loss));
    }

    pub(super) fn value(&self) -> Pair {
        let mut total = Pair::default();
        for (&sum, lost) in self.sums.iter().zip(self.lost) {
            total.add(sum);
            // What an infinite sum lost is NaN.
            total.lo += if lost.is_nan() { 0.0 } else { lost };
        }
        total
    }
}

struct Sum<'s>(&'s mut Total, &'s [f64]);

impl Kernel for Sum<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let Self(Total { sums, lost }, loss) = self;
        for lane in (0..Total::LANES).step_by(S::F64::LANES) {
            let mut sum = Wide::of(Span::of(sums).load(isa, lane), Span::of(lost).load(isa, lane));
            for j in (lane..loss.len()).step_by(Total::LANES) {
                <f64 as Summand>::add(isa, &mut sum, Span::of(loss).load(isa, j));
            }
            let (a, b) = sum.parts();
            SpanMut::of(sums).store(isa, lane, a);
            SpanMut::of(lost).store(isa, lane, b);
        }
    }
}

/// Counts up.
pub(super) struct Count<'s>(pub(super) usize, pub(super) &'s mut [usize]);

impl Kernel for Count<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, _isa: S) {
        self.1.iter_mut().zip(self.0..).for_each(|(to, number)| *to = number);
    }
}

/// Puts the rows from `row` up to `last` that count into `kept`, as many as there is room for: their number, and the first row not looked at.
pub(super) fn collect(job: &Job, mut row: usize, last: usize, kept: &mut [usize]) -> (usize, usize) {
    let mut n = 0;
    if job.weights.all {
        n = kept.len().min(last - row);
        job.level.run(Count(row, &mut kept[..n]));
        return (n, row + n);
    }
    while row < last && n < kept.len() {
        kept[n] = row;
        n += usize::from(job.kept(row));
        row += 1;
    }
    (n, row)
}

/// A loss of float32 times its weight: an infinite one without weight is 0.
#[inline(always)]
pub(super) fn weighed(loss: f64, weight: f64) -> f64 {
    f64::from((if weight == 0.0 && !loss.is_nan() { 0.0 } else { loss * weight }) as f32)
}

/// Zero results and gradients of the rows that were left out.
pub(super) fn ignored(job: &Job, start: usize, end: usize, kept: &[usize]) {
    let mut at = 0;
    for row in start..end {
        if kept.get(at) == Some(&row) {
            at += 1;
            continue;
        }
        if let Some(result) = job.result {
            result.set(job.rows.offset(RESULT, row), 0.0);
        }
        if let Some(out) = job.out {
            let base = job.rows.offset(OUT, row);
            job.classes.runs(OUT, 0, job.classes.size, |offset, stride, _, n| out.zero(base + offset, stride, n));
        }
    }
}

/// Whether there are rows in a strip that are not kept: only adjacent ones are carried along.
pub(super) fn left_out(strip: &Strip) -> bool {
    let Strip { job, kept, .. } = *strip;
    !job.weights.all && job.tile_read == Path::Columns && kept.iter().any(|&row| !job.kept(row))
}

/// The losses of those, and of rows without classes.
pub(super) fn leave_out(strip: &Strip, tile: &mut Tile) {
    let Strip { job, kept, .. } = *strip;
    // The sum over no classes is 0, their logsumexp −inf; and what is left out counts nothing.
    let nothing = if job.classes.size == 0 && job.terms.z_loss != 0.0 { f64::INFINITY } else { 0.0 };
    for (loss, &row) in tile.loss.iter_mut().zip(kept) {
        let keep = job.kept(row);
        if job.classes.size == 0 || !keep {
            *loss = if keep { nothing } else { 0.0 };
        }
    }
}

/// Calls `with(slot, entry, class)` for every sparse target of a strip.
#[inline(always)]
pub(super) fn targets(strip: &Strip, mut with: impl FnMut(usize, usize, usize)) {
    let Some(labels) = &strip.job.labels else { return };
    for (slot, &row) in strip.kept.iter().enumerate() {
        for (j, &class) in labels.class[row * labels.entries..][..labels.entries].iter().enumerate() {
            if class != NONE {
                with(slot, j, class as usize);
            }
        }
    }
}

/// Fills the inputs of `finish` that do not depend on the logits, unless they are the same for every row. `spreads`: what smoothing gives the classes.
pub(super) fn prepare(strip: &Strip, tile: &mut Tile, spreads: &[Spread]) -> Option<Plain> {
    let Strip { job, kept, .. } = *strip;
    let (n, entries) = (kept.len(), job.terms.entries);
    tile.reserve(n, entries);
    if job.kind != Kind::Loss {
        return None;
    }
    let single = job.labels.as_ref().is_none_or(|labels| entries == 1 && labels.share.is_empty());
    if single && job.weight.is_empty() && job.bend.mask.is_none() && !job.weights.sampled() && job.upstream.is_none() {
        return Some(Plain { g: job.g, mass: job.keep, mass_all: job.keep + job.spread });
    }
    strip.weigh_samples(tile);
    let Some(labels) = &job.labels else { return None };
    tile.order.clear();
    for (slot, &row) in kept.iter().enumerate() {
        for j in 0..entries {
            tile.mass[j * APART + slot] = 0.0;
            tile.mass_all[j * APART + slot] = 0.0;
            tile.x_target[j * APART + slot] = 0.0;
        }
        let Spread { share: spread, .. } = spreads.get(slot).copied().unwrap_or_default();
        for (j, class, share) in labels.row(row) {
            let w = job.weight.get(class).copied().unwrap_or(1.0);
            let mass = share * job.keep * w;
            tile.mass[j * APART + slot] = mass;
            tile.mass_all[j * APART + slot] = mass + spread * w;
        }
        if entries > 1 {
            let start = tile.order.len();
            tile.order.resize(start + entries, (usize::MAX, 0));
            let order = &mut tile.order[start..];
            for ((j, class, _), of) in labels.row(row).zip(&mut *order) {
                *of = (class, j * APART + slot);
            }
            order.sort_unstable();
            // Entries of one class have the mass of all of them.
            for same in order.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1 && same[0].0 != usize::MAX) {
                let mass: f64 = same.iter().map(|&(_, at)| tile.mass[at]).sum();
                let w = job.weight.get(same[0].0).copied().unwrap_or(1.0);
                for &(_, at) in same {
                    tile.mass_all[at] = mass + spread * w;
                }
            }
        }
    }
    None
}

/// Writes row results and adds the losses.
pub(super) fn settle(strip: &Strip, tile: &mut Tile, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let loss = job.kind == Kind::Loss;
    if let Some(result) = job.result {
        let values = if loss { &tile.loss } else { &tile.lse };
        strip.runs(RESULT, |offset, stride, slot, n| result.write(offset, stride, n, &values[slot..], 1));
    }
    if loss {
        total.add(job.level, &mut tile.loss, kept.len());
    }
}
