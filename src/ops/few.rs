//! Strips in the plain case of few classes, which [`crate::kernels::few`] can do alone: from a tile to results.

use crate::array::{Array, ColumnsMut, DType, Out};
use crate::kernels::columns::{self, BLOCK, Runs};
use crate::kernels::few::{self, Few, Smooth, Want};
use crate::kernels::finish::{Tile, WIDTH};
use crate::simd::{Isa, Kernel, Level};

use super::api::Exec;
use super::by_columns;
use super::job::{Job, Kind, OUT, RESULT, X};
use super::plan::Path;
use super::scratch::{Buffer, Buffers, SCRATCH, Scratch, Work, room};
use super::source::gather;
use super::strip::{Strip, Total, weighed};
use super::targets::NONE;
use super::tiles::{LANES, Move};

/// Shares of the target that are none, and that [`Few`] would lose digits of.
const LEAST: f64 = 1e-30;

/// Whether losses are those of [`Few`]: index targets in float32, smoothed or not, and nothing but what multiplies the loss of a row or replaces its logits.
pub(super) fn plain<T: Work>(job: &Job) -> bool {
    let Some(labels) = &job.labels else { return false };
    T::DTYPE == DType::F32
        && job.level != Level::Scalar
        && (1..=BLOCK).contains(&job.classes.size)
        && labels.entries == 1
        && labels.share.is_empty()
        && (!job.terms.dense || job.weight.is_empty() && job.bend.mask.is_none() && job.spread >= LEAST)
        && job.terms.z_loss == 0.0
}

/// What makes a target of [`plain`] smooth.
fn smooth(job: &Job) -> Option<Smooth> {
    (job.kind == Kind::Loss && job.terms.dense).then_some(Smooth { keep: job.keep, share: job.spread })
}

/// Whether [`plain_strip`] can do all of it.
pub(super) fn all_plain<T: Work>(job: &Job) -> bool {
    if job.kind != Kind::Loss {
        // A sum with the maximum wants more digits of the logarithm than float32 has.
        return job.kind != Kind::LogSumExp
            && job.level != Level::Scalar
            && T::DTYPE == DType::F32
            && (1..=BLOCK).contains(&job.classes.size);
    }
    plain::<T>(job)
}

/// What multiplies the losses of a strip, to its weights if that is not 1, and what multiplies its gradients, to `g`: NaN where [`Few`] would lose
/// digits of those. Whether there are such rows.
fn factors<T: Work>(strip: &Strip, tile: &mut Tile, g: &mut [T]) -> bool {
    let Strip { job, kept, .. } = *strip;
    let of_row = |g: f64| {
        let g = g * job.terms.scale;
        let fits = few::gradient_fits::<T>(g) && (!job.terms.dense || few::gradient_fits::<T>(g * job.spread));
        T::from_f64(if fits { g } else { f64::NAN })
    };
    if !job.weighted() && job.upstream.is_none() {
        let all = of_row(job.g);
        if job.out.is_some() {
            g.fill(all);
        }
        return job.out.is_some() && all.to_f64().is_nan();
    }
    strip.weigh(tile);
    if job.out.is_none() {
        return false;
    }
    let mut far = false;
    for (to, &g) in g.iter_mut().zip(&tile.g[..kept.len()]) {
        *to = of_row(g);
        far |= to.to_f64().is_nan();
    }
    // Those of no row.
    g[kept.len()..].fill(T::ZERO);
    far
}

/// The classes of a strip as numbers; of rows without one, any.
struct Numbers<'s, T> {
    labels: &'s [i64],
    /// Whose they are, but for a run of all of them.
    rows: Option<&'s [usize]>,
    target: &'s mut [T],
}

impl<'s, T: Work> Numbers<'s, T> {
    fn of(strip: &'s Strip, target: &'s mut [T]) -> Self {
        let labels = strip.job.labels.as_ref().map_or(&[][..], |labels| &labels.class);
        if strip.run {
            return Self { labels: &labels[strip.kept[0]..][..strip.kept.len()], rows: None, target };
        }
        Self { labels, rows: Some(strip.kept), target }
    }
}

impl<T: Work> Kernel for Numbers<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, _isa: S) {
        // There are few classes: half of the integer is all of it, and what vectors can convert.
        match self.rows {
            None => {
                for (target, &class) in self.target.iter_mut().zip(self.labels) {
                    *target = T::number_f32(class as i32 as f32);
                }
            }
            Some(rows) => {
                for (target, &row) in self.target.iter_mut().zip(rows) {
                    *target = T::number_f32(self.labels[row] as i32 as f32);
                }
            }
        }
    }
}

/// Most rows of a small call, and most elements.
const SMALL: usize = 64;
pub(super) const SMALL_SIZE: usize = SMALL * columns::MOST;

/// The plain case of one strip of float32 rows in C order with int64 labels, where making a job of it would take longer than the work: the mean of
/// the losses, and the gradient. Nothing, and nothing is written, where it is not that simple: [`super::entry::cross_entropy`] knows.
pub(super) fn small(exec: &Exec, x: &Array, y: &Array, ignore: Option<i64>, out: Option<&Out>) -> Option<f64> {
    let (&[n, classes], &[labels]) = (x.shape(), y.shape()) else { return None };
    let in_order =
        |array: &Array, dtype: DType, strides: &[isize]| array.dtype() == dtype && array.is_plain() && array.strides() == strides;
    let rows = [classes as isize * 4, 4];
    if exec.level == Level::Scalar
        || !(1..=SMALL).contains(&n)
        || !(2..=columns::MOST).contains(&classes)
        || labels != n
        || !in_order(x, DType::F32, &rows)
        || !in_order(y, DType::I64, &[8])
        || out.is_some_and(|out| out.array().shape() != x.shape() || !in_order(out.array(), DType::F32, &rows))
    {
        return None;
    }
    let mut class = [0; SMALL];
    if y.read_classes(false, 0, 8, n, classes, ignore, NONE, &mut class, 1) != (None, false) {
        return None;
    }
    let mut target = [0.0; SMALL];
    target.iter_mut().zip(&class).for_each(|(target, &class)| *target = class as f32);
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let Scratch { tile, single, offsets, .. } = &mut *scratch;
    tile.reserve(n, 0);
    let stride = n.next_multiple_of(LANES);
    let logits = room(&mut single.x, classes * stride);
    let tiled = ColumnsMut::of(logits, stride, classes, stride);
    let filled = if classes == 2 {
        Move::<f32, f32>::PairsIn(x.span(0, 2 * n), tiled)
    } else {
        Move::RowsIn(x.rows(0, offsets[0].run(rows[0], n, stride), classes), tiled)
    };
    exec.level.run(filled);
    let divisor = n as f64;
    let lanes = room(&mut single.block, few::LANES * stride);
    let want = if out.is_some() { Want::Gradient } else { Want::Loss };
    let left = exec.level.run(Few {
        scale: 1.0,
        want,
        x: tiled,
        rows: n,
        target: &target,
        smooth: None,
        g: &[(1.0 / divisor) as f32; SMALL],
        loss: &mut tile.loss,
        lanes,
        ahead: Runs::NONE,
    });
    let mean = (!left).then(|| {
        let mut total = Total::default();
        total.add(exec.level, &mut tile.loss, n);
        total.value().value() / divisor
    });
    if let (Some(_), Some(out)) = (mean, out) {
        exec.level.run(if classes == 2 {
            Move::<f32, f32>::PairsOut(tiled.read(), out.span(0, 2 * n))
        } else {
            Move::RowsOut(tiled.read(), out.rows(0, offsets[0].run(rows[0], n, n), classes))
        });
    }
    SCRATCH.set(Some(scratch));
    mean
}

/// The losses of a strip; its logits stay as they are.
pub(super) fn losses<T: Work>(strip: &Strip, x: ColumnsMut<T>, flat: &mut Buffer<T>, loss: &mut [f64]) {
    let (target, lanes) = room(flat, (1 + few::LANES) * WIDTH).split_at_mut(WIDTH);
    strip.job.level.run(Numbers::of(strip, target));
    let (scale, rows) = (strip.job.terms.scale, strip.kept.len());
    let smooth = smooth(strip.job);
    strip.job.level.run(Few { scale, want: Want::Loss, x, rows, target, smooth, g: &[], loss, lanes, ahead: Runs::NONE });
}

/// One strip in the plain case.
pub(super) fn plain_strip<T: Work>(strip: &Strip, stride: usize, scratch: &mut Scratch, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let (classes, n) = (job.classes.size, kept.len());
    let mut offsets = core::mem::take(&mut scratch.offsets);
    let (tile, Buffers { x: kept_x, block: flat, bent, .. }, _) = T::buffers(scratch);
    tile.reserve(n, 1);
    let mut x = core::mem::take(kept_x);
    let logits = room(&mut x, classes * stride);
    strip.fill::<T>(job.x, X, job.tile_read, (0, classes), (&mut *logits, stride), &mut offsets, flat);
    bent.bend(strip, logits, stride, (0, classes), job.out.is_some());
    let (target, lanes) = room(flat, (2 + few::LANES) * WIDTH).split_at_mut(WIDTH);
    let (g, lanes) = lanes.split_at_mut(WIDTH);
    let far = job.kind == Kind::Loss && factors(strip, tile, g);
    if far && g[..n].iter().all(|g| g.to_f64().is_nan()) {
        *kept_x = x;
        scratch.offsets = offsets;
        return by_columns::strip::<T>(strip, stride, scratch, total);
    }
    if job.labels.is_some() {
        job.level.run(Numbers::of(strip, target));
    }
    let want = match job.kind {
        Kind::Loss if job.out.is_some() => Want::Gradient,
        Kind::Loss => Want::Loss,
        Kind::Softmax => Want::Probabilities,
        Kind::LogSoftmax | Kind::LogSumExp => Want::Logs,
    };
    let tiled = ColumnsMut::of(logits, stride, classes, stride);
    let left = job.level.run(Few {
        scale: job.terms.scale,
        want,
        x: tiled,
        rows: n,
        target,
        smooth: smooth(job),
        g,
        loss: &mut tile.loss,
        lanes,
        ahead: by_columns::ahead(strip),
    });
    if job.out.is_some() {
        bent.unbend(strip, &mut logits[..classes * stride]);
    }
    if job.kind == Kind::Loss && job.weighted() {
        for (loss, weight) in tile.loss.iter_mut().zip(&tile.weight[..n]) {
            *loss = weighed(*loss, *weight);
        }
    }
    if far {
        tile.loss.iter_mut().zip(&g[..n]).filter(|(_, g)| g.to_f64().is_nan()).for_each(|(loss, _)| *loss = f64::NAN);
    }
    // Only adjacent rows are in a strip without being kept.
    if !job.weights.all && job.tile_read == Path::Columns {
        for slot in (0..n).filter(|&slot| !job.kept(kept[slot])) {
            tile.loss[slot] = 0.0;
            (0..classes).for_each(|c| logits[c * stride + slot] = T::ZERO);
        }
    }
    if left || far {
        // The others know nothing of them: one by one, while their logits still stand where they were.
        let mut loss = tile.loss.clone();
        let nan: Vec<bool> = loss.iter().map(|loss| loss.is_nan()).collect();
        for slot in (0..n).filter(|&slot| nan[slot]) {
            let mut one = Total::default();
            by_columns::strip::<T>(&Strip::new(job, &kept[slot..=slot]), stride, scratch, &mut one);
            loss[slot] = one.value().value();
            if let Some(out) = job.out {
                gather(out.array(), OUT, &job.classes, job.rows.offset(OUT, kept[slot]), 0, &mut logits[slot..], classes, stride);
            }
        }
        T::buffers(scratch).0.loss = loss;
    }
    let (tile, Buffers { x: kept_x, block: flat, .. }, _) = T::buffers(scratch);
    if let Some(result) = job.result {
        strip.runs(RESULT, |offset, stride, slot, n| result.write(offset, stride, n, &tile.loss[slot..], 1));
    }
    if let Some(out) = job.out {
        strip.empty::<T>(out, (0, classes), (logits, stride), false, &mut offsets, flat);
    }
    *kept_x = x;
    total.add(job.level, &mut tile.loss, n);
    scratch.offsets = offsets;
}
