//! Puts mutants into a copy of the crate, all at once, each behind a switch: `if crate::mutant(k) { mutated } else { original }`.
//!
//! `crossent-mutants CRATE EVERY EXCLUDED...` rewrites the kernels and the batch operations under CRATE/src and prints one line per mutant:
//! number, file, line, what it changes. Of all places that could be mutated it takes every EVERY-th, and of those not the excluded numbers.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use proc_macro2::Span;
use quote::{ToTokens, quote};
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{BinOp, Expr, Stmt, UnOp, parse_quote};

struct Mutator {
    every: usize,
    excluded: HashSet<usize>,
    file: String,
    places: usize,
    count: usize,
}

impl Mutator {
    /// The number of a mutant for the next place, if it is one of the sample.
    fn take(&mut self, span: Span, what: &str) -> Option<u32> {
        self.places += 1;
        if self.places % self.every != 0 {
            return None;
        }
        self.count += 1;
        if self.excluded.contains(&self.count) {
            return None;
        }
        println!("{}\t{}\t{}\t{what}", self.count, self.file, span.start().line);
        Some(u32::try_from(self.count).expect("few mutants"))
    }
}

/// What an operator becomes.
fn other(op: &BinOp) -> Option<BinOp> {
    Some(match op {
        BinOp::Add(_) => parse_quote!(-),
        BinOp::Sub(_) => parse_quote!(+),
        BinOp::Mul(_) => parse_quote!(/),
        BinOp::Div(_) => parse_quote!(*),
        BinOp::Rem(_) => parse_quote!(/),
        BinOp::And(_) => parse_quote!(||),
        BinOp::Or(_) => parse_quote!(&&),
        BinOp::BitAnd(_) => parse_quote!(|),
        BinOp::BitOr(_) => parse_quote!(&),
        BinOp::Eq(_) => parse_quote!(!=),
        BinOp::Ne(_) => parse_quote!(==),
        BinOp::Lt(_) => parse_quote!(<=),
        BinOp::Le(_) => parse_quote!(<),
        BinOp::Gt(_) => parse_quote!(>=),
        BinOp::Ge(_) => parse_quote!(>),
        BinOp::AddAssign(_) => parse_quote!(-=),
        BinOp::SubAssign(_) => parse_quote!(+=),
        BinOp::MulAssign(_) => parse_quote!(/=),
        BinOp::BitOrAssign(_) => parse_quote!(&=),
        BinOp::BitAndAssign(_) => parse_quote!(|=),
        _ => return None,
    })
}

fn has_let(expr: &Expr) -> bool {
    match expr {
        Expr::Let(_) => true,
        Expr::Binary(binary) => has_let(&binary.left) || has_let(&binary.right),
        Expr::Paren(paren) => has_let(&paren.expr),
        _ => false,
    }
}

fn short(tokens: impl ToTokens) -> String {
    let text = tokens.to_token_stream().to_string();
    text.chars().take(80).collect()
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| attribute.path().is_ident("cfg") || attribute.path().is_ident("test"))
}

impl VisitMut for Mutator {
    // What is evaluated by the compiler has no switch.
    fn visit_item_const_mut(&mut self, _: &mut syn::ItemConst) {}
    fn visit_item_static_mut(&mut self, _: &mut syn::ItemStatic) {}
    fn visit_impl_item_const_mut(&mut self, _: &mut syn::ImplItemConst) {}
    fn visit_trait_item_const_mut(&mut self, _: &mut syn::TraitItemConst) {}
    fn visit_type_mut(&mut self, _: &mut syn::Type) {}
    fn visit_pat_mut(&mut self, _: &mut syn::Pat) {}
    fn visit_generic_argument_mut(&mut self, _: &mut syn::GenericArgument) {}
    fn visit_expr_repeat_mut(&mut self, repeat: &mut syn::ExprRepeat) {
        self.visit_expr_mut(&mut repeat.expr);
    }
    fn visit_expr_const_mut(&mut self, _: &mut syn::ExprConst) {}
    fn visit_macro_mut(&mut self, _: &mut syn::Macro) {}
    fn visit_attribute_mut(&mut self, _: &mut syn::Attribute) {}
    fn visit_item_mod_mut(&mut self, module: &mut syn::ItemMod) {
        if !is_test(&module.attrs) {
            visit_mut::visit_item_mod_mut(self, module);
        }
    }
    fn visit_item_fn_mut(&mut self, function: &mut syn::ItemFn) {
        if function.sig.constness.is_none() {
            visit_mut::visit_item_fn_mut(self, function);
        }
    }
    fn visit_impl_item_fn_mut(&mut self, function: &mut syn::ImplItemFn) {
        if function.sig.constness.is_none() {
            visit_mut::visit_impl_item_fn_mut(self, function);
        }
    }

    fn visit_block_mut(&mut self, block: &mut syn::Block) {
        visit_mut::visit_block_mut(self, block);
        for stmt in &mut block.stmts {
            // Calls for their effect alone.
            let Stmt::Expr(expr @ (Expr::Call(_) | Expr::MethodCall(_)), Some(_)) = stmt else { continue };
            // Asking for memory ahead changes nothing but the time.
            if ["prefetch", ". ask (", ". fence ("].iter().any(|name| expr.to_token_stream().to_string().contains(name)) {
                continue;
            }
            if let Some(k) = self.take(expr.span(), &format!("without {}", short(&*expr))) {
                *stmt = parse_quote!(if !crate::mutant(#k) { #expr; });
            }
        }
    }

    fn visit_expr_mut(&mut self, expr: &mut Expr) {
        visit_mut::visit_expr_mut(self, expr);
        let span = expr.span();
        match expr {
            Expr::Binary(binary) if !has_let(&binary.left) && !has_let(&binary.right) => {
                let Some(op) = other(&binary.op) else { return };
                let what = format!("{} for {} in {}", op.to_token_stream(), binary.op.to_token_stream(), short(&*binary));
                let Some(k) = self.take(span, &what) else { return };
                let (left, right) = (&binary.left, &binary.right);
                let old = &binary.op;
                *expr = parse_quote!((if crate::mutant(#k) { #left #op #right } else { #left #old #right }));
            }
            Expr::Unary(unary) if matches!(unary.op, UnOp::Not(_)) => {
                if let Some(k) = self.take(span, &format!("no ! in {}", short(&*unary))) {
                    let inner = &unary.expr;
                    *expr = parse_quote!((if crate::mutant(#k) { #inner } else { !#inner }));
                }
            }
            Expr::If(branch) if !has_let(&branch.cond) => {
                let constant = self.places % 2 == 0;
                if let Some(k) = self.take(span, &format!("{constant} for {}", short(&branch.cond))) {
                    let cond = &branch.cond;
                    branch.cond =
                        if constant { parse_quote!(crate::mutant(#k) || #cond) } else { parse_quote!(!crate::mutant(#k) && (#cond)) };
                }
            }
            _ => {}
        }
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).expect("the folder").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let root = PathBuf::from(arguments.next().expect("CRATE EVERY EXCLUDED..."));
    let every = arguments.next().expect("EVERY").parse().expect("a number");
    let excluded = arguments.map(|number| number.parse().expect("a number")).collect();
    let mut mutator = Mutator { every, excluded, file: String::new(), places: 0, count: 0 };
    let mut files = Vec::new();
    sources(&root.join("src/kernels"), &mut files);
    sources(&root.join("src/ops"), &mut files);
    for path in files {
        mutator.file = path.strip_prefix(&root).expect("inside").display().to_string();
        let mut file = syn::parse_file(&std::fs::read_to_string(&path).expect("a file")).expect("Rust");
        mutator.visit_file_mut(&mut file);
        std::fs::write(&path, prettyplease::unparse(&file)).expect("written");
    }
    let switch = quote! {
        /// Whether a mutant is on: the one that MUTANT names.
        #[inline(always)]
        pub(crate) fn mutant(k: u32) -> bool {
            MUTANT.load(core::sync::atomic::Ordering::Relaxed) == k
        }
        static MUTANT: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);
        extern "C" fn switch_on() {
            let k = std::env::var("MUTANT").ok().and_then(|k| k.parse().ok()).unwrap_or(0);
            MUTANT.store(k, core::sync::atomic::Ordering::Relaxed);
        }
        #[used]
        #[unsafe(link_section = ".init_array")]
        static SWITCH_ON: extern "C" fn() = switch_on;
    };
    let lib = root.join("src/lib.rs");
    let text = std::fs::read_to_string(&lib).expect("src/lib.rs");
    std::fs::write(&lib, format!("{text}\n{switch}\n")).expect("written");
    eprintln!("{} places", mutator.places);
}
