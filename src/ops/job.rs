//! A call as data, and the loop over its rows: reduce → finish → emit behind softmax, log-softmax, logsumexp and cross-entropy.

use std::sync::Mutex;

use crate::array::{Array, DType, Out};
use crate::kernels::columns;
use crate::kernels::finish::{Terms, WIDTH};
use crate::kernels::state::Pair;
use crate::simd::Level;
use crate::threads;
use crate::tunables::tunables;

use super::api::{Error, Exec};
use super::plan::{Axes, Operands, Path, path, tile_path, with_axes};
use super::scratch::SCRATCH;
use super::source::Bend;
use super::strip::Total;
use super::targets::{Labels, RowWeights, filled, row_shape};
use super::{by_columns, by_rows, segments, straight};

/// Elements per task: enough to be worth handing to another thread, and a function of the shape alone, so that the bits do not depend on the threads.
pub(super) const TASK: usize = 1 << 15;

/// Rows per task, which cost something each however few classes there are.
const TASK_ROWS: usize = 1 << 12;

/// Elements per task of a large batch of long rows.
const LONG_TASK: usize = 1 << 18;

/// Rows per task: of long ones several, so that memory is read in long stretches, but enough tasks to share evenly.
pub(super) fn rows_per_task(rows: usize, classes: usize) -> usize {
    let classes = classes.max(1);
    (TASK / classes).max((LONG_TASK / classes).min(rows / 64)).max(1)
}

/// Bytes of the longest rows beside a dense stream whose vectors run across rows: alone they would cost more by themselves than by their classes.
const STREAMS: usize = 512;

/// Where results go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stores {
    /// To the caches.
    Cached,
    /// Past the caches, where nothing has to be read back.
    Past,
    /// Past the caches; exponentials are computed again rather than kept in the result.
    PastAnew,
}

/// What is computed of every row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Softmax,
    LogSoftmax,
    LogSumExp,
    Loss,
}

/// Operands of the class axes and of the row axes.
pub(super) const X: usize = 0;
pub(super) const OUT: usize = 1;
pub(super) const PROBS: usize = 2;
/// Operands of the row axes alone.
pub(super) const RESULT: usize = 3;
pub(super) const UPSTREAM: usize = 4;
/// Operand of both again.
pub(super) const MASK: usize = 5;

#[allow(clippy::struct_excessive_bools)]
pub(super) struct Job<'a> {
    pub(super) kind: Kind,
    pub(super) x: &'a Array<'a>,
    pub(super) out: Option<&'a Out<'a>>,
    pub(super) probs: Option<&'a Array<'a>>,
    pub(super) result: Option<&'a Out<'a>>,
    pub(super) upstream: Option<&'a Array<'a>>,
    pub(super) level: Level,
    pub(super) classes: Axes,
    pub(super) rows: Axes,
    /// Whether vectors run along the classes: [`super::by_rows`], or [`super::by_columns`].
    pub(super) by_rows: bool,
    /// Whether rows of logits can be read where they stand, and of results be written there; `there` if they must be bent, but otherwise could; `lines`
    /// if they at least are runs of elements, forwards or backwards.
    pub(super) direct: bool,
    pub(super) there: bool,
    pub(super) lines: bool,
    pub(super) direct_out: bool,
    /// How tiles are filled and emptied.
    pub(super) tile_read: Path,
    pub(super) tile_write: Path,
    pub(super) tile_probs: Path,
    pub(super) probs_lie_in_rows: bool,
    pub(super) labels: Option<Labels>,
    pub(super) weights: RowWeights,
    pub(super) bend: Bend<'a>,
    /// Class weights, empty when all are 1.
    pub(super) weight: Vec<f64>,
    /// Share of the target that stays where it is: 1 − e.
    pub(super) keep: f64,
    /// Share per class that smoothing adds: e / C.
    pub(super) spread: f64,
    /// Multiplies every gradient: upstream / divisor.
    pub(super) g: f64,
    pub(super) terms: Terms,
    /// A function of the shape alone.
    pub(super) rows_per_task: usize,
    pub(super) stores: Stores,
    /// Whether results in columns are written past the caches.
    pub(super) past_columns: bool,
    /// Whether the logits are in no cache, and whether the lines that results go to are not.
    pub(super) far: bool,
    pub(super) cold: bool,
}

impl<'a> Job<'a> {
    /// Whether a row counts.
    #[inline(always)]
    pub(super) fn kept(&self, row: usize) -> bool {
        self.weights.kept(self.labels.as_ref(), row)
    }

    /// Whether there are weights of rows or classes.
    pub(super) fn weighted(&self) -> bool {
        self.weights.sampled() || !self.weight.is_empty()
    }

    /// Whether every row has a dense stream of its own.
    pub(super) fn own_dense(&self) -> bool {
        let differs = self.probs.is_some() || self.bend.mask.is_some() || self.labels.as_ref().is_some_and(|labels| labels.partial);
        self.terms.dense && differs && !self.even()
    }

    /// Whether all classes of a row that take part have the same share of the target beside the sparse ones, which takes no stream.
    pub(super) fn even(&self) -> bool {
        self.by_rows && self.terms.dense && self.probs.is_none() && self.weight.is_empty()
    }

    /// A job without targets. `operands` are out, probs, result and upstream strides, in the logits' axes. `streams`: there will be a dense stream.
    pub(super) fn new(
        kind: Kind,
        x: &'a Array<'a>,
        axes: &[usize],
        out: Option<&'a Out<'a>>,
        probs: Option<&'a Array<'a>>,
        result: Option<&'a Out<'a>>,
        upstream: Option<&'a Array<'a>>,
        (bend, streams): (Bend<'a>, bool),
        level: Level,
    ) -> Result<Self, Error> {
        let shape = x.shape();
        let ndim = shape.len();
        if axes.iter().any(|&axis| axis >= ndim) || !x.dtype().is_float() {
            return Err(Error::Invalid("axis or dtype of the logits"));
        }
        let rows_shape = row_shape(shape, axes);
        for like in out.iter().map(|out| out.array()).chain(probs) {
            if like.shape() != shape || !like.dtype().is_float() {
                return Err(Error::Invalid("an array does not have the logits' shape"));
            }
        }
        for rows in result.iter().map(|out| out.array()).chain(upstream) {
            if rows.shape() != &rows_shape[..] || !rows.dtype().is_float() {
                return Err(Error::Invalid("an array does not have the shape of the rows"));
            }
        }
        if out.is_some_and(|out| out.array().dtype() != x.dtype()) || result.is_some_and(|r| r.array().dtype() != x.dtype().row_dtype()) {
            return Err(Error::Invalid("dtype of a result"));
        }
        let strides = x.strides();
        let like = |array: Option<&'a Array<'a>>| array.map_or(strides, Array::strides);
        if bend.mask.is_some_and(|mask| mask.shape() != shape) {
            return Err(Error::Invalid("where does not have the logits' shape"));
        }
        // Operands that are not there must not keep axes apart: they alias the logits.
        let reduced = |array: Option<&Array>| array.map(|array| with_axes(array.strides(), ndim, axes));
        let (of_result, of_upstream) = (reduced(result.map(Out::array)), reduced(upstream));
        let present: Operands<&[isize]> = Operands::from_buf([
            strides,
            like(out.map(Out::array)),
            like(probs),
            of_result.as_deref().unwrap_or(strides),
            of_upstream.as_deref().unwrap_or(strides),
            like(bend.mask),
        ]);
        let classes = Axes::new(shape, &present_classes(&present, bend.mask.is_some()), axes.iter().copied());
        let rows = Axes::new(shape, &present, (0..ndim).filter(|axis| !axes.contains(axis)));
        // Only the logits and the kind of target decide on the arithmetic of a row, and neither the number of rows nor where they lie: a class axis that
        // is a line of adjacent elements, or no line at all, is read along the classes, unless they are few.
        let own = Axes::new(shape, &[strides], axes.iter().copied());
        let size = x.dtype().size() as isize;
        let exotic = !own.is_line();
        let most = if streams {
            STREAMS / if x.dtype() == DType::F64 { 8 } else { 4 }
        } else if exotic {
            columns::BLOCK
        } else {
            columns::MOST
        };
        let by_rows = own.size > most && (exotic || own.inner_stride(0).abs() == size);
        let adjacent = |array: &Array, operand| path(array, operand, &classes, &rows) == Path::Rows;
        let there = adjacent(x, X);
        let direct = there && !bend.is_some();
        let lines = x.is_plain() && classes.is_line() && (classes.size == 1 || classes.inner_stride(X).abs() == size);
        let direct_out = out.is_some_and(|out| adjacent(out.array(), OUT));
        let probs_lie_in_rows = probs.is_some_and(|probs| adjacent(probs, PROBS));
        let tile_path = |array: &Array, operand| tile_path(array, operand, &classes, &rows);
        let tile_read = tile_path(x, X);
        let tile_write = out.map_or(tile_read, |out| tile_path(out.array(), OUT));
        let tile_probs = probs.map_or(tile_read, |probs| tile_path(probs, PROBS));
        // Written past the caches what would only push out what is yet to be read; not in place, where the lines are at hand.
        let bytes = x.size() * x.dtype().size();
        let stores = match out {
            Some(out) if out.array().ptr != x.ptr && 2 * bytes >= tunables().stream_from => {
                if tunables().recompute > usize::from(level != Level::Avx512) { Stores::PastAnew } else { Stores::Past }
            }
            _ => Stores::Cached,
        };
        // In place the lines are in the cache already.
        let in_place = out.is_some_and(|out| out.array().starts_as(x));
        let far = 2 * bytes >= tunables().ask_from;
        let cold = far && out.is_some() && !in_place;
        let past_columns = !by_rows && out.is_some() && !in_place && bytes >= tunables().stream_columns_from;
        let per_row = (TASK / classes.size.max(1)).min(TASK_ROWS);
        let rows_per_task = per_row.max(if by_rows { rows_per_task(rows.size, classes.size) } else { WIDTH });
        // Whole strips, or what is left over would be a small one in every task.
        let rows_per_task = if rows_per_task < WIDTH { rows_per_task } else { rows_per_task / WIDTH * WIDTH };
        Ok(Self {
            kind,
            x,
            out,
            probs,
            result,
            upstream,
            level,
            bend,
            classes,
            rows,
            by_rows,
            there,
            direct,
            lines,
            direct_out,
            tile_read,
            tile_write,
            tile_probs,
            probs_lie_in_rows,
            labels: None,
            weights: RowWeights { all: true, ..RowWeights::default() },
            weight: Vec::new(),
            keep: 1.0,
            spread: 0.0,
            g: 1.0,
            terms: Terms {
                scale: 1.0,
                z_loss: 0.0,
                ulp: if x.dtype() == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) },
                entries: 0,
                dense: false,
                gradient: out.is_some(),
                stored: false,
                plain: None,
                loss: kind == Kind::Loss,
            },
            rows_per_task,
            stores,
            far,
            cold,
            past_columns,
        })
    }

    /// To be called by whoever has written results, before another thread reads them.
    pub(super) fn hand_on(&self) {
        if self.stores != Stores::Cached || self.past_columns {
            self.level.fence();
        }
    }

    /// Rows per task.
    fn per_task(&self) -> usize {
        if straight::fits(self) { straight::rows_per_task(self.rows.size, self.classes.size) } else { self.rows_per_task }
    }

    /// Tasks that the rows are cut into.
    fn tasks(&self) -> usize {
        self.rows.size.div_ceil(self.per_task())
    }

    /// Whether the work is shared among threads.
    pub(super) fn shared(&self, exec: &Exec) -> bool {
        exec.threads > 1 && (self.tasks() > 1 && self.rows.size * self.classes.size >= 2 * TASK || self.split(exec))
    }

    /// Whether threads share a row: where there are fewer of those, or of the strips of columns.
    fn split(&self, exec: &Exec) -> bool {
        if straight::fits(self) {
            return (1..exec.threads).contains(&self.tasks()) && straight::parts(self.classes.size) > 1;
        }
        (1..exec.threads).contains(&self.rows.size)
            && match self.x.dtype() {
                DType::F32 => segments::segmented::<f32>(self),
                DType::F64 => segments::segmented::<f64>(self),
                _ => false,
            }
    }

    /// Runs over all rows and returns the sum of the row results.
    pub(super) fn run(&self, exec: &Exec) -> Result<f64, Error> {
        let tasks = self.tasks();
        let (per_task, split) = (self.per_task(), self.split(exec));
        let work = |task: usize| -> Result<Pair, Error> {
            let first = task * per_task;
            let last = self.rows.size.min(first + per_task);
            let mut scratch = SCRATCH.take().unwrap_or_default();
            let mut sum = Total::default();
            let threads = if split { exec.threads } else { 1 };
            match (self.by_rows, self.x.dtype()) {
                (true, DType::F64) => by_rows::run::<f64>(self, first, last, &mut scratch, &mut sum),
                (true, _) => by_rows::run::<f32>(self, first, last, &mut scratch, &mut sum),
                (false, DType::F64) => by_columns::run::<f64>(self, first, last, threads, &mut scratch, &mut sum),
                (false, _) => by_columns::run::<f32>(self, first, last, threads, &mut scratch, &mut sum),
            }
            SCRATCH.set(Some(scratch));
            self.hand_on();
            Ok(sum.value())
        };
        let mut total = Pair::default();
        if split && self.by_rows {
            let (mut scratch, mut sum) = (SCRATCH.take().unwrap_or_default(), Total::default());
            match self.x.dtype() {
                DType::F64 => segments::split::<f64>(self, exec.threads, &mut scratch, &mut sum),
                _ => segments::split::<f32>(self, exec.threads, &mut scratch, &mut sum),
            }
            SCRATCH.set(Some(scratch));
            return Ok(sum.value().value());
        }
        if split || !self.shared(exec) {
            for task in 0..tasks {
                total.merge(work(task)?);
            }
            return Ok(total.value());
        }
        let partial = Mutex::new(filled(Pair::default(), tasks)?);
        threads::for_each(exec.threads, tasks, &|task| {
            // The dtype was checked when the job was made.
            if let Ok(sum) = work(task)
                && let Ok(mut partial) = partial.lock()
            {
                partial[task] = sum;
            }
        });
        for sum in partial.into_inner().unwrap_or_default() {
            total.merge(sum);
        }
        Ok(total.value())
    }
}

/// The operands that have class axes; the row operands stand for themselves only among rows.
pub(super) fn present_classes<'s>(strides: &[&'s [isize]], mask: bool) -> Operands<&'s [isize]> {
    let mut classes = Operands::from_slice(strides);
    (classes[RESULT], classes[UPSTREAM]) = (strides[X], strides[X]);
    if !mask {
        classes[MASK] = strides[X];
    }
    classes
}
