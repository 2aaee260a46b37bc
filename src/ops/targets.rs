//! Class indices: read once, checked, and used from the copy, so that another thread that changes them meanwhile can do no harm.

use std::cell::Cell;
use std::sync::Mutex;

use crate::array::{Array, Dims};
use crate::kernels::finish::WIDTH;
use crate::kernels::state::Pair;
use crate::simd::{Isa, Kernel, Level};
use crate::threads;

use super::api::{Error, Target};
use super::plan::Axes;
use super::strip::Total;

/// Marks an entry without a class: a number that no argument is likely to have.
pub const NONE: i64 = i64::MIN;

/// Checked targets: `entries` classes per row with their shares.
#[derive(Debug, Default)]
pub struct Labels {
    /// Entries per row.
    pub entries: usize,
    /// Class of entry j of row r at `r * entries + j`, or [`NONE`].
    pub class: Vec<i64>,
    /// Its share of the row's target, 1 when empty.
    pub share: Vec<f64>,
    /// Whether a row lacks a side, and with it that side's part of the smoothing.
    pub partial: bool,
    /// Whether every entry is known to have a class.
    pub whole: bool,
}

/// `len` copies of a value. Arguments may be broadcast views with more elements than memory can hold: that is an error, not an abort.
pub fn filled<T: Copy>(value: T, len: usize) -> Result<Vec<T>, Error> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| Error::OutOfMemory)?;
    values.resize(len, value);
    Ok(values)
}

thread_local! {
    /// The class indices of the call before: large results of the allocator are fresh pages each time.
    static SPARE: Cell<Vec<i64>> = const { Cell::new(Vec::new()) };
}

/// Most class indices that are kept for the next call.
const SPARE_MOST: usize = 1 << 20;

/// `n` entries, to be overwritten.
fn entries(n: usize) -> Result<Vec<i64>, Error> {
    let mut class = SPARE.take();
    class.try_reserve_exact(n.saturating_sub(class.len())).map_err(|_| Error::OutOfMemory)?;
    class.resize(n, NONE);
    Ok(class)
}

impl Drop for Labels {
    fn drop(&mut self) {
        if self.class.capacity() <= SPARE_MOST {
            SPARE.set(core::mem::take(&mut self.class));
        }
    }
}

/// Reads values of shape (rows, inner) in C order.
pub fn read_all(array: &Array) -> Result<Vec<f64>, Error> {
    let strides: &[isize] = array.strides();
    let axes = Axes::new(array.shape(), &[strides], 0..array.shape().len());
    let mut values = filled(0.0, axes.size)?;
    axes.runs(0, 0, axes.size, |offset, stride, start, n| array.read(offset, stride, n, &mut values[start..], 1));
    Ok(values)
}

/// The same of an argument that may be absent: empty then.
pub fn read_optional(array: Option<&Array>) -> Result<Vec<f64>, Error> {
    array.map_or(Ok(Vec::new()), read_all)
}

/// Reads and checks class indices of any integer type to `out[first], out[first + step], …`, in C order; `rows` are the sample weights (empty when
/// all are 1) and the number of indices per row. Whether every index is a class.
pub(super) fn classes(
    threads: usize,
    argument: &'static str,
    array: &Array,
    classes: usize,
    ignore: Option<i64>,
    rows: (&[f64], usize),
    out: &mut [i64],
    step: usize,
    first: usize,
) -> Result<bool, Error> {
    let axes = Axes::new(array.shape(), &[array.strides()], 0..array.shape().len());
    let (mut failure, mut whole) = (None, true);
    // Labels of rows that are left out may be anything.
    let (sample, per_row) = rows;
    let left_out = |position: usize| !sample.is_empty() && sample[position / per_row] == 0.0;
    axes.runs(0, 0, axes.size, |offset, stride, start, n| {
        // All at once, or between rows that are left out.
        let mut i = 0;
        while i < n && failure.is_none() {
            let some = if sample.is_empty() { n } else { (i..n).take_while(|&i| !left_out(start + i)).count() };
            if some == 0 {
                out[(start + i) * step + first] = NONE;
                whole = false;
                i += 1;
                continue;
            }
            let dst = &mut out[(start + i) * step + first..];
            let read = |from: usize, n: usize, dst: &mut [i64]| {
                let run = (offset + (i + from) as isize * stride, stride, n);
                // Integers are the same on every level.
                Level::best().run(Read { array, run, classes, ignore, dst, step })
            };
            let (bad, ignored) = if threads > 1 && some > CHUNK { shared(threads, some, dst, step, &read) } else { read(0, some, dst) };
            whole &= !ignored;
            if let Some((bad, value)) = bad {
                failure = Some(Error::TargetOutOfBounds { argument, position: start + i + bad, value });
            }
            i += some;
        }
    });
    failure.map_or(Ok(whole), Err)
}

/// Class indices that one thread reads at a time.
const CHUNK: usize = 1 << 13;

/// The first index that is no class, with its value, and whether any was to be ignored.
type Findings = (Option<(usize, i128)>, bool);

/// `n` class indices by several threads: memory answers two faster than one.
fn shared(
    threads: usize,
    n: usize,
    dst: &mut [i64],
    step: usize,
    read: &(dyn Fn(usize, usize, &mut [i64]) -> Findings + Sync),
) -> Findings {
    let parts: Vec<_> = dst.chunks_mut(CHUNK * step).take(n.div_ceil(CHUNK)).map(|dst| Mutex::new((dst, (None, false)))).collect();
    threads::for_each(threads, parts.len(), &|part| {
        if let Ok(mut of_part) = parts[part].lock() {
            let (dst, findings) = &mut *of_part;
            *findings = read(part * CHUNK, CHUNK.min(n - part * CHUNK), dst);
        }
    });
    let mut all = (None, false);
    for (part, result) in parts.into_iter().enumerate() {
        let (bad, ignored) = result.into_inner().map_or((None, false), |(_, findings)| findings);
        all.0 = all.0.or(bad.map(|(at, value)| (part * CHUNK + at, value)));
        all.1 |= ignored;
    }
    all
}

/// A run of class indices, as a kernel.
struct Read<'s, 'a> {
    array: &'s Array<'a>,
    run: (isize, isize, usize),
    classes: usize,
    ignore: Option<i64>,
    dst: &'s mut [i64],
    step: usize,
}

impl Kernel for Read<'_, '_> {
    type Output = Findings;
    #[inline(always)]
    fn run<S: Isa>(self, _isa: S) -> Findings {
        let (offset, stride, n) = self.run;
        self.array.read_classes(S::LEVEL != Level::Scalar, offset, stride, n, self.classes, self.ignore, NONE, self.dst, self.step)
    }
}

impl Labels {
    /// Reads and checks the targets of `rows` rows with their sample weights, if any; `None` for class probabilities.
    pub fn new(
        threads: usize,
        target: &Target,
        rows: usize,
        classes_len: usize,
        ignore: Option<i64>,
        sample: &[f64],
    ) -> Result<Option<Self>, Error> {
        let sizes = match target {
            Target::Probs(_) => [rows, rows],
            Target::Index(array) => [array.size(), rows],
            Target::Mixup { a, b, .. } => [a.size(), b.size()],
            Target::Sparse { indices, .. } => [indices.shape().split_last().map_or(0, |(_, rows)| rows.iter().product()), rows],
        };
        if sizes != [rows, rows] {
            return Err(Error::Invalid("the target does not have the shape of the rows"));
        }
        if !sample.is_empty() && sample.len() != rows {
            return Err(Error::Invalid("sample_weight must have one element per row"));
        }
        Ok(Some(match target {
            Target::Probs(_) => return Ok(None),
            Target::Index(array) => {
                let mut class = entries(rows)?;
                let whole = classes(threads, "target", array, classes_len, ignore, (sample, 1), &mut class, 1, 0)?;
                Self { entries: 1, class, share: Vec::new(), partial: false, whole }
            }
            Target::Mixup { a, b, lam } => {
                let mut class = entries(rows.checked_mul(2).ok_or(Error::OutOfMemory)?)?;
                classes(threads, "y_a", a, classes_len, ignore, (sample, 1), &mut class, 2, 0)?;
                classes(threads, "y_b", b, classes_len, ignore, (sample, 1), &mut class, 2, 1)?;
                let lam = read_all(lam)?;
                if let Some(position) = lam.iter().position(|lam| !(0.0..=1.0).contains(lam)) {
                    return Err(Error::BadValue { argument: "lam", position, value: lam[position] });
                }
                let mut share = filled(0.0, class.len())?;
                for (pair, &lam) in share.chunks_exact_mut(2).zip(&lam) {
                    pair.copy_from_slice(&[lam, 1.0 - lam]);
                }
                let partial = class.chunks_exact(2).any(|pair| (pair[0] == NONE) != (pair[1] == NONE));
                Self { entries: 2, class, share, partial, whole: false }
            }
            Target::Sparse { indices, probs } => {
                let entries = indices.shape().last().copied().unwrap_or(0);
                let mut class = self::entries(entries.checked_mul(rows).ok_or(Error::OutOfMemory)?)?;
                classes(threads, "indices", indices, classes_len, None, (sample, entries), &mut class, 1, 0)?;
                Self { entries, class, share: read_all(probs)?, partial: false, whole: false }
            }
        }))
    }

    /// Share of a row's sides that have a class; the others take their part of the smoothing with them.
    pub fn kept_share(&self, row: usize) -> f64 {
        if self.partial { self.row(row).map(|(_, _, share)| share).sum() } else { 1.0 }
    }

    /// The entries of a row: (class, share), those without a class left out.
    #[inline]
    pub fn row(&self, row: usize) -> impl Iterator<Item = (usize, usize, f64)> + '_ {
        let at = row * self.entries;
        (0..self.entries).filter_map(move |j| {
            let class = self.class[at + j];
            (class != NONE).then(|| (j, class as usize, if self.share.is_empty() { 1.0 } else { self.share[at + j] }))
        })
    }
}

/// What is known of the rows before the logits are read.
#[derive(Debug, Default)]
pub struct RowWeights {
    /// Sample weight per row; empty when all are 1.
    pub sample: Vec<f64>,
    /// Divisor of the mean.
    pub divisor: f64,
    /// Whether any row is kept.
    pub any: bool,
    /// Whether every row is.
    pub all: bool,
}

impl RowWeights {
    /// Checks the sample weights and sums the divisor.
    pub fn new(
        level: Level,
        labels: Option<&Labels>,
        sparse: bool,
        rows: usize,
        weight: &[f64],
        sample: Vec<f64>,
        normalizer: Option<f64>,
    ) -> Result<Self, Error> {
        if let Some(position) = sample.iter().position(|&s| s.is_nan() || s < 0.0) {
            return Err(Error::BadValue { argument: "sample_weight", position, value: sample[position] });
        }
        let mut this = Self { sample, divisor: 0.0, any: false, all: false };
        if weight.is_empty() && this.sample.is_empty() && (labels.is_none() || sparse) {
            this.divisor = rows as f64;
            this.any = rows > 0;
            this.all = true;
        } else if let Some(labels) = labels
            && weight.is_empty()
            && this.sample.is_empty()
            && labels.entries == 1
        {
            let kept = if labels.whole { rows } else { labels.class.iter().filter(|&&class| class != NONE).count() };
            this.divisor = kept as f64;
            this.any = kept > 0;
            this.all = kept == rows;
        } else if let Some(labels) = labels
            && labels.entries == 1
            && labels.share.is_empty()
        {
            let (mut total, mut some, mut kept) = (Total::default(), [0.0; WIDTH], 0);
            for (first, class) in (0..).step_by(WIDTH).zip(labels.class.chunks(WIDTH)) {
                for (i, (w, &class)) in some.iter_mut().zip(class).enumerate() {
                    let sample = this.sample_weight(first + i);
                    let counts = class != NONE && sample != 0.0;
                    kept += usize::from(counts);
                    *w = if counts { weight.get(class as usize).copied().unwrap_or(1.0) * sample } else { 0.0 };
                }
                total.add(level, &mut some, class.len());
            }
            this.divisor = total.value().value();
            this.any = kept > 0;
            this.all = kept == rows;
        } else {
            let (mut sum, mut kept) = (Pair::default(), 0);
            for row in (0..rows).filter(|&row| this.kept(labels, row)) {
                let w = match labels {
                    Some(labels) if !sparse => {
                        labels.row(row).map(|(_, class, share)| share * weight.get(class).copied().unwrap_or(1.0)).sum()
                    }
                    _ => 1.0,
                };
                sum.add(w * this.sample_weight(row));
                kept += 1;
            }
            this.divisor = sum.value();
            this.any = kept > 0;
            this.all = kept == rows;
        }
        if let Some(normalizer) = normalizer {
            this.divisor = normalizer;
        }
        Ok(this)
    }

    /// Whether there are sample weights.
    pub fn sampled(&self) -> bool {
        !self.sample.is_empty()
    }

    /// The sample weight of a row.
    #[inline]
    pub fn sample_weight(&self, row: usize) -> f64 {
        if self.sample.is_empty() { 1.0 } else { self.sample[row] }
    }

    /// Whether a row counts.
    #[inline]
    pub fn kept(&self, labels: Option<&Labels>, row: usize) -> bool {
        self.sample_weight(row) != 0.0
            && labels.is_none_or(|labels| {
                labels.entries == 0 || labels.class[row * labels.entries..(row + 1) * labels.entries].iter().any(|&class| class != NONE)
            })
    }
}

/// The shape of the rows: the logits' shape without the class axes.
pub fn row_shape(shape: &[usize], axes: &[usize]) -> Dims<usize> {
    shape.iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, &len)| len).collect()
}
