//! The Kullback–Leibler divergence of two arrays of logits and its gradient.

use std::sync::Mutex;

use crate::array::{Array, DType, Out, SpanMut};
use crate::kernels::divergence::{Divergence, Slope};
use crate::kernels::scan::BLOCK;
use crate::kernels::scan::Constants;
use crate::kernels::state::Pair;
use crate::simd::{Isa, Kernel};
use crate::threads;

use super::api::{Error, Exec, Grad, GradOutput, Reduction};
use super::blocks::{Chunk, Feed, Layout, Operand, RowResult, TILE, assert_asked, in_float64, states};
use super::job::{TASK, rows_per_task};
use super::plan::with_axes;
use super::scratch::{Buffer, SCRATCH, Work, room};
use super::targets::{filled, row_shape};

/// Operands of a call.
const P: usize = 0;
const Q: usize = 1;
const OUT: usize = 2;
const RESULT: usize = 3;
const UPSTREAM: usize = 4;

/// KL(P‖Q) of P = softmax(p·scale) and Q = softmax(q·scale) over `axis`; the reduced loss, or 0 when the rows go to `rows`. The mean divides by
/// the number of rows. The gradient is for `q_logits`, whose type it has; everything is checked before anything is written.
pub fn kl_divergence(
    exec: &Exec,
    p_logits: &Array,
    q_logits: &Array,
    axis: usize,
    temperature: f64,
    reduction: Reduction,
    rows: Option<&Out>,
    grad: Option<&Grad>,
) -> Result<f64, Error> {
    let shape = p_logits.shape();
    if axis >= shape.len() || q_logits.shape() != shape || !p_logits.dtype().is_float() || !q_logits.dtype().is_float() {
        return Err(Error::Invalid("axis, shapes or dtypes of the logits"));
    }
    let double = p_logits.dtype() == DType::F64 || q_logits.dtype() == DType::F64;
    let upstream = grad.and_then(|grad| if let GradOutput::Rows(rows) = &grad.grad_output { Some(rows) } else { None });
    let of_rows = row_shape(shape, &[axis]);
    if rows.iter().map(|out| out.array()).chain(upstream).any(|array| array.shape() != &of_rows[..] || !array.dtype().is_float()) {
        return Err(Error::Invalid("an array does not have the shape of the rows"));
    }
    if rows.is_some_and(|out| (out.array().dtype() == DType::F64) != double) {
        return Err(Error::Invalid("dtype of the rows"));
    }
    if grad.is_some_and(|grad| grad.out.array().shape() != shape || grad.out.array().dtype() != q_logits.dtype()) {
        return Err(Error::Invalid("shape or dtype of the gradient"));
    }
    let like =
        |array: Option<&Array>| array.map_or_else(|| with_axes(&[], shape.len(), &[]), |a| with_axes(a.strides(), shape.len(), &[axis]));
    let (result, up) = (like(rows.map(Out::array)), like(upstream));
    let out = grad.map_or(q_logits, |grad| grad.out.array());
    let mut operands: Vec<&[isize]> = vec![p_logits.strides(), q_logits.strides(), out.strides(), &result, &up];
    // Operands that are not there must not keep axes apart.
    if rows.is_none() {
        operands[RESULT] = p_logits.strides();
    }
    if upstream.is_none() {
        operands[UPSTREAM] = p_logits.strides();
    }
    let layout = Layout::new(shape, axis, &operands);
    let count = layout.rows.size;
    let factor = grad.map_or(0.0, |grad| if let GradOutput::Scalar(g) = grad.grad_output { g } else { 1.0 });
    let job = Job {
        x: [Operand::new(p_logits, P, &layout), Operand::new(q_logits, Q, &layout)],
        layout: &layout,
        scale: 1.0 / temperature,
        double,
        out: grad.map(|grad| &grad.out),
        out_direct: grad.is_some_and(|grad| Operand::new(grad.out.array(), OUT, &layout).is_direct()),
        result: rows.map(|out| RowResult { out, index: RESULT }),
        upstream,
        g: if reduction == Reduction::Mean { factor / count as f64 } else { factor },
    };
    let per_task = rows_per_task(count, 2 * layout.classes.size);
    let per_task = if job.is_tiled() { per_task.next_multiple_of(TILE) } else { per_task };
    let tasks = count.div_ceil(per_task);
    let threads = if count * layout.classes.size < TASK { 1 } else { exec.threads };
    let partial = Mutex::new(filled(Pair::default(), tasks)?);
    let wide = double || in_float64(exec.level, DType::F32);
    let task = |task: usize| {
        let (first, last) = (task * per_task, count.min((task + 1) * per_task));
        let mut kept = SCRATCH.take().unwrap_or_default();
        let (job, scratch) = (&job, &mut *kept);
        let sum = if wide {
            exec.level.run(Chunk::<_, f64>::new(job, first, last, scratch))
        } else {
            exec.level.run(Chunk::<_, f32>::new(job, first, last, scratch))
        };
        SCRATCH.set(Some(kept));
        if let Ok(mut partial) = partial.lock() {
            partial[task] = sum;
        }
    };
    threads::for_each(threads, tasks, &task);
    let mut total = Pair::default();
    for sum in partial.into_inner().unwrap_or_default() {
        total.merge(sum);
    }
    Ok(match reduction {
        Reduction::Mean => total.value() / count as f64,
        Reduction::Sum => total.value(),
        Reduction::None => 0.0,
    })
}

struct Job<'a> {
    x: [Operand<'a>; 2],
    layout: &'a Layout,
    scale: f64,
    double: bool,
    out: Option<&'a Out<'a>>,
    /// Whether the gradient can be written where it goes.
    out_direct: bool,
    result: Option<RowResult<'a>>,
    upstream: Option<&'a Array<'a>>,
    /// Multiplies every gradient.
    g: f64,
}

impl Job<'_> {
    fn is_tiled(&self) -> bool {
        self.x.iter().any(Operand::is_tiled)
    }

    fn settle(&self, row: usize, kl: f64, sum: &mut Pair) {
        let kl = if self.double { kl } else { f64::from(kl as f32) };
        sum.add(kl);
        if let Some(result) = &self.result {
            result.set(self.layout, row, kl);
        }
    }

    fn factor(&self, row: usize) -> f64 {
        let upstream = self.upstream.map_or(1.0, |g| g.get::<f64>(self.layout.rows.offset(UPSTREAM, row)));
        self.g * self.scale * upstream
    }
}

impl<T: Work> Kernel for Chunk<'_, Job<'_>, T> {
    type Output = Pair;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> Pair {
        assert_asked::<S, T>();
        let Chunk { job, first, last, .. } = self;
        let (_, buffers, _) = T::buffers(self.scratch);
        let feeds = [Feed::new(&job.x[P], &mut buffers.x), Feed::new(&job.x[Q], &mut buffers.dense)];
        work(isa, job, first, last, feeds, &mut buffers.block)
    }
}

#[inline(always)]
fn work<S: Isa, T: Work>(isa: S, job: &Job, first: usize, last: usize, mut feeds: [Feed<T>; 2], buffer: &mut Buffer<T>) -> Pair {
    let constants = Constants::<S, T>::new(isa, job.scale);
    let empty = Divergence::new(&constants);
    let classes = job.layout.classes.size;
    let (mut rows, mut slopes) = (states(empty, job.is_tiled()), states(None, job.is_tiled()));
    let mut sum = Pair::default();
    let mut row = first;
    while row < last {
        let n = job.layout.together(job.is_tiled(), row, last);
        rows[..n].fill(empty);
        for start in (0..classes).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            for (feed, x) in feeds.iter_mut().zip(&job.x) {
                feed.load(S::LEVEL, x, row, n, start, len);
            }
            for (slot, state) in rows[..n].iter_mut().enumerate() {
                let (p, p_next) = feeds[P].block(&job.x[P], row, slot, start, len);
                let (q, q_next) = feeds[Q].block(&job.x[Q], row, slot, start, len);
                state.block(&constants, [p, q], [p_next, q_next], start);
            }
        }
        for slot in 0..n {
            // Without classes there is nothing to differ.
            let (kl, slope) = if classes == 0 {
                (0.0, None)
            } else {
                let (kl, slope) = rows[slot].finish(&constants);
                (kl, Some(slope))
            };
            job.settle(row + slot, kl, &mut sum);
            slopes[slot] = slope;
        }
        let Some(out) = job.out else {
            row += n;
            continue;
        };
        for start in (0..classes).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            for (feed, x) in feeds.iter_mut().zip(&job.x) {
                feed.load(S::LEVEL, x, row, n, start, len);
            }
            for (slot, slope) in slopes[..n].iter().enumerate() {
                let Some(slope) = slope else { continue };
                let (p, _) = feeds[P].block(&job.x[P], row, slot, start, len);
                let (q, _) = feeds[Q].block(&job.x[Q], row, slot, start, len);
                let (base, g) = (job.layout.rows.offset(OUT, row + slot), job.factor(row + slot));
                let direct = job.out_direct && out.array().dtype() == T::DTYPE;
                let block = &mut room(buffer, BLOCK)[..len];
                let dst = if direct { out.span::<T>(base, classes).part(start, len) } else { SpanMut::of(&mut *block) };
                slope.emit(&constants, [p, q], g, dst);
                if !direct {
                    let step = job.layout.classes.inner_stride(OUT);
                    out.write(base + start as isize * step, step, len, block, 1);
                }
            }
        }
        for (slot, slope) in slopes[..n].iter().enumerate() {
            if let Some(Slope { valid: true, top: Some((class, difference)), .. }) = slope {
                let base = job.layout.rows.offset(OUT, row + slot) + job.layout.classes.offset(OUT, *class);
                out.set(base, job.factor(row + slot) * difference);
            }
        }
        row += n;
    }
    sum
}
