//! Vector-Jacobian products of softmax and log-softmax, and the loss of given log-probabilities.

use core::marker::PhantomData;
use core::ops::Range;
use std::sync::Mutex;

use crate::array::{Array, DType, Element, Out, RowsMut, Span, SpanMut, Vf};
use crate::kernels::math::{Exp, exp_full};
use crate::kernels::state::{Pair, Wide};
use crate::simd::{Isa, Kernel, Level, Vector};
use crate::threads;

use super::api::{Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
use super::plan::{Axes, with_axes};
use super::scratch::{OfType, Work};
use super::source::line;
use super::targets::{Labels, RowWeights, filled, read_optional, row_shape};
use super::tiles::Move;

const BLOCK: usize = 512;
const TASK: usize = 1 << 15;

/// Rows: `p·(g − Σ g·p)`, or `g − exp(lp)·Σ g`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    log: bool,
    level: Level,
    g: &'a Array<'a>,
    p: &'a Array<'a>,
    out: &'a Out<'a>,
    classes: &'a Axes,
    others: &'a Axes,
    /// Whether vectors can move g, p and the result.
    lines: [bool; 3],
}

/// Whether the classes of an operand are adjacent.
fn adjacent(array: &Array, operand: usize, classes: &Axes) -> bool {
    array.is_plain() && classes.is_line() && classes.inner_stride(operand) == array.dtype().size() as isize
}

impl Rows<'_> {
    /// Classes from `start` on of g or p.
    fn read<T: Work>(&self, operand: usize, row: usize, start: usize, dst: &mut [T]) {
        let (array, base) = ([self.g, self.p][operand], self.others.offset(operand, row));
        if self.lines[operand] {
            let size = array.dtype().size();
            return line(self.level, array, base + (start * size) as isize, false, (dst.len() * size) as isize, dst);
        }
        self.classes.runs(operand, start, dst.len(), |offset, stride, at, n| array.read(base + offset, stride, n, &mut dst[at..], 1));
    }

    fn write<T: Work>(&self, row: usize, start: usize, src: &[T]) {
        let (base, dtype) = (self.others.offset(2, row), self.out.array().dtype());
        if self.lines[2] && dtype.row_dtype() == T::DTYPE {
            let offset = base + (start * dtype.size()) as isize;
            return T::of_type(dtype, Narrow { level: self.level, out: self.out, offset, src });
        }
        self.classes.runs(2, start, src.len(), |offset, stride, at, n| self.out.write(base + offset, stride, n, &src[at..], 1));
    }
}

/// A run of the result.
struct Narrow<'s, 'a, T> {
    level: Level,
    out: &'s Out<'a>,
    offset: isize,
    src: &'s [T],
}

impl<T: Work> OfType<T> for Narrow<'_, '_, T> {
    fn run<E: Element<Acc = T>>(self) {
        let dst = RowsMut::single(self.out.span::<E>(self.offset, self.src.len()));
        self.level.run(Move::<E, T>::Narrow(Span::of(self.src), dst));
    }
}

/// Some of them, computed in `T`.
struct Part<'a, T>(Rows<'a>, Range<usize>, PhantomData<T>);

impl<T: Work> Kernel for Part<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let (Self(rows, some, _), step) = (self, Vf::<S, T>::LANES);
        let exp = Exp::<Vf<S, T>>::new(isa, 1.0);
        let (mut g, mut p) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
        let size = rows.classes.size;
        let once = size <= BLOCK;
        for row in some {
            let mut sum = Wide::zero(isa);
            for start in (0..size).step_by(BLOCK) {
                let n = BLOCK.min(size - start);
                rows.read(0, row, start, &mut g[..n]);
                if once || !rows.log {
                    rows.read(1, row, start, &mut p[..n]);
                }
                // What is not there adds nothing.
                g[n..n.next_multiple_of(step)].fill(T::ZERO);
                p[n..n.next_multiple_of(step)].fill(T::ZERO);
                for i in (0..n).step_by(step) {
                    let v = Span::of(&g).load(isa, i);
                    T::add(isa, &mut sum, if rows.log { v } else { v * Span::of(&p).load(isa, i) });
                }
            }
            let total = Vf::<S, T>::splat(isa, T::from_f64(T::total(sum).value()));
            for start in (0..size).step_by(BLOCK) {
                let n = BLOCK.min(size - start);
                if !once {
                    rows.read(0, row, start, &mut g[..n]);
                    rows.read(1, row, start, &mut p[..n]);
                }
                for i in (0..n).step_by(step) {
                    let (gv, pv) = (Span::of(&g).load(isa, i), Span::of(&p).load(isa, i));
                    let v = if rows.log { gv - exp_full(isa, &exp, pv) * total } else { pv * (gv - total) };
                    SpanMut::of(&mut p).store(isa, i, v);
                }
                rows.write(row, start, &p[..n]);
            }
        }
    }
}

fn vjp(exec: &Exec, g: &Array, p: &Array, axis: usize, out: &Out, log: bool) -> Result<(), Error> {
    let shape = p.shape();
    if axis >= shape.len() || g.shape() != shape || out.array().shape() != shape || out.array().dtype() != p.dtype() {
        return Err(Error::Invalid("shapes or dtypes of the vjp"));
    }
    if !p.dtype().is_float() || !g.dtype().is_float() {
        return Err(Error::Invalid("dtypes of the vjp"));
    }
    if p.size() == 0 {
        return Ok(());
    }
    let strides = [g.strides(), p.strides(), out.array().strides()];
    let classes = Axes::new(shape, &strides, core::iter::once(axis));
    let rows = Axes::new(shape, &strides, (0..shape.len()).filter(|&a| a != axis));
    let lines = [adjacent(g, 0, &classes), adjacent(p, 1, &classes), adjacent(out.array(), 2, &classes)];
    let all = Rows { log, level: exec.level, g, p, out, classes: &classes, others: &rows, lines };
    let per_task = (TASK / classes.size.max(1)).max(1);
    threads::for_each(exec.threads, rows.size.div_ceil(per_task), &|task| {
        let some = task * per_task..rows.size.min((task + 1) * per_task);
        // A float64 upstream gradient keeps its digits until the one rounding of the result.
        if p.dtype() == DType::F64 || g.dtype() == DType::F64 {
            exec.level.run(Part::<f64>(all, some, PhantomData));
        } else {
            exec.level.run(Part::<f32>(all, some, PhantomData));
        }
    });
    Ok(())
}

/// `p·(g − Σ g·p)` over `axis`.
pub fn softmax_vjp(exec: &Exec, grad_output: &Array, probs: &Array, axis: usize, out: &Out) -> Result<(), Error> {
    vjp(exec, grad_output, probs, axis, out, false)
}

/// `g − exp(lp)·Σ g` over `axis`.
pub fn log_softmax_vjp(exec: &Exec, grad_output: &Array, log_probs: &Array, axis: usize, out: &Out) -> Result<(), Error> {
    vjp(exec, grad_output, log_probs, axis, out, true)
}

/// `−w[y]·x[y]`, reduced; the gradient is `−w[y]` at y and 0 elsewhere.
pub fn nll_loss(
    exec: &Exec,
    log_probs: &Array,
    axis: usize,
    target: &Array,
    options: &LossOptions,
    rows: Option<&Out>,
    grad: Option<&Grad>,
) -> Result<f64, Error> {
    let shape = log_probs.shape();
    let ndim = shape.len();
    if axis >= ndim || !log_probs.dtype().is_float() || target.shape() != &row_shape(shape, &[axis])[..] {
        return Err(Error::Invalid("shapes or dtypes of nll_loss"));
    }
    if grad.is_some_and(|g| g.out.array().shape() != shape || g.out.array().dtype() != log_probs.dtype()) {
        return Err(Error::Invalid("shape or dtype of the gradient"));
    }
    if rows.is_some_and(|r| r.array().shape() != target.shape()) {
        return Err(Error::Invalid("shape of the row losses"));
    }
    let out = grad.map_or(log_probs, |g| g.out.array());
    let spread = |a: &Array| with_axes(a.strides(), ndim, &[axis]);
    let upstream = grad.and_then(|g| if let GradOutput::Rows(rows) = &g.grad_output { Some(rows) } else { None });
    let result = rows.map_or_else(|| with_axes(&[], ndim, &[]), |r| spread(r.array()));
    let up = upstream.map_or_else(|| with_axes(&[], ndim, &[]), spread);
    let strides: [&[isize]; 4] = [log_probs.strides(), out.strides(), &result, &up];
    let classes = Axes::new(shape, &strides[..2], core::iter::once(axis));
    let axes = Axes::new(shape, &strides, (0..ndim).filter(|&a| a != axis));
    let weight = read_optional(options.weight.as_ref())?;
    if !weight.is_empty() && weight.len() != classes.size {
        return Err(Error::Invalid("weight must have one element per class"));
    }
    let sample = read_optional(options.sample_weight.as_ref())?;
    let labels =
        Labels::new(1, &Target::Index(target.clone()), axes.size, classes.size, options.ignore_index, &sample)?.unwrap_or_default();
    let weights = RowWeights::new(exec.level, Some(&labels), false, axes.size, &weight, sample, options.normalizer)?;
    let divisor = if options.reduction == Reduction::Mean { weights.divisor } else { 1.0 };
    let g = grad.map_or(0.0, |g| if let GradOutput::Scalar(g) = g.grad_output { g } else { 1.0 } / divisor);
    let single = log_probs.dtype().row_dtype() == DType::F32;
    let per_task = (TASK / if grad.is_some() { classes.size.max(1) } else { 1 }).max(1);
    let tasks = axes.size.div_ceil(per_task);
    let partial = Mutex::new(filled(Pair::default(), tasks)?);
    threads::for_each(if axes.size * classes.size > TASK { exec.threads } else { 1 }, tasks, &|task| {
        let mut sum = Pair::default();
        for row in task * per_task..axes.size.min((task + 1) * per_task) {
            let class = labels.row(row).next().map(|(_, class, _)| class);
            let (mut loss, mut slope) = (0.0, 0.0);
            if let Some(class) = class {
                let w = weight.get(class).copied().unwrap_or(1.0);
                if w != 0.0 {
                    loss = -w * log_probs.get::<f64>(axes.offset(0, row) + classes.offset(0, class));
                }
                slope = -w * g * upstream.map_or(1.0, |up| up.get(axes.offset(3, row)));
            }
            let loss = if single { f64::from(loss as f32) } else { loss };
            sum.add(loss);
            if let Some(rows) = rows {
                rows.set(axes.offset(2, row), loss);
            }
            if let Some(grad) = grad {
                let base = axes.offset(1, row);
                classes.runs(1, 0, classes.size, |offset, stride, _, n| grad.out.zero(base + offset, stride, n));
                if let Some(class) = class {
                    grad.out.set(base + classes.offset(1, class), slope);
                }
            }
        }
        if let Ok(mut partial) = partial.lock() {
            partial[task] = sum;
        }
    });
    let mut total = Pair::default();
    for sum in partial.into_inner().unwrap_or_default() {
        total.merge(sum);
    }
    Ok(match options.reduction {
        Reduction::Mean => total.value() / divisor,
        Reduction::Sum => total.value(),
        Reduction::None => 0.0,
    })
}
