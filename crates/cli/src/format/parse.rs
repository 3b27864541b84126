//! Go templates (text/template), as far as scripts use them: read.

use serde_json::Value;

/// Deepest that actions and parentheses may be nested.
const DEPTH_MAX: usize = 64;

/// A piece of a template.
#[derive(Debug, PartialEq)]
pub(super) enum Node {
    Text(String),
    Show(Pipe),
    Set(String, Pipe),
    If(Pipe, Vec<Node>, Vec<Node>),
    With(Pipe, Vec<Node>, Vec<Node>),
    Range(Range),
}

/// `{{range $key, $value := …}}`.
#[derive(Debug, PartialEq)]
pub(super) struct Range {
    pub(super) key: Option<String>,
    pub(super) value: Option<String>,
    pub(super) over: Pipe,
    pub(super) body: Vec<Node>,
    pub(super) otherwise: Vec<Node>,
}

/// Commands, each given what the one before it gave.
#[derive(Debug, PartialEq)]
pub(super) struct Pipe(pub(super) Vec<Command>);

/// A value, or a function and its arguments.
#[derive(Debug, PartialEq)]
pub(super) struct Command(pub(super) Vec<Term>);

/// A word of a command.
#[derive(Debug, PartialEq)]
pub(super) enum Term {
    Literal(Value),
    Function(String),
    /// `.A.B`, `$.A`, `$x.A`, `(…).A`.
    Path(Base, Vec<String>),
}

/// Where a path begins.
#[derive(Debug, PartialEq)]
pub(super) enum Base {
    Dot,
    Variable(String),
    Pipe(Pipe),
}

/// Reads a template.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, String> {
    let mut parser = Parser {
        pieces: pieces(text)?.into_iter(),
        depth: 0,
    };
    match parser.nodes()? {
        (nodes, End::Text) => Ok(nodes),
        (_, end) => Err(format!("{{{{{}}}}} has no beginning", end.word())),
    }
}

enum Piece {
    Text(String),
    Action(Vec<Token>),
}

/// Text and actions, with the space gone that `{{-` and `-}}` take away.
fn pieces(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut trim = false;
    loop {
        let (before, action) = match rest.split_once("{{") {
            Some((before, action)) => (before, Some(action)),
            None => (rest, None),
        };
        let mut before = if trim { before.trim_start() } else { before };
        let Some(mut action) = action else {
            pieces.push(Piece::Text(before.to_owned()));
            return Ok(pieces);
        };
        if let Some(trimmed) = action.strip_prefix('-')
            && trimmed.starts_with(char::is_whitespace)
        {
            before = before.trim_end();
            action = trimmed;
        }
        pieces.push(Piece::Text(before.to_owned()));
        if let Some(comment) = action.trim_start().strip_prefix("/*") {
            let (_, after) = comment.split_once("*/").ok_or("a comment has no end")?;
            let (mark, after) = after
                .split_once("}}")
                .ok_or("a comment is followed by }}")?;
            trim = mark.trim() == "-";
            rest = after;
            continue;
        }
        let (tokens, after) = tokens(action)?;
        let mut tokens = tokens;
        trim = tokens.last() == Some(&Token::Minus);
        if trim {
            tokens.pop();
        }
        pieces.push(Piece::Action(tokens));
        rest = after;
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    /// `.` alone.
    Dot,
    /// `.Name`; whether it follows the token before it at once.
    Field(String, bool),
    Variable(String),
    Literal(Value),
    Open,
    Close,
    Pipe,
    Comma,
    Assign,
    Minus,
}

/// The tokens of an action, and what follows its `}}`.
fn tokens(action: &str) -> Result<(Vec<Token>, &str), String> {
    let mut tokens = Vec::new();
    let mut rest = action;
    let mut adjacent = false;
    loop {
        let trimmed = rest.trim_start();
        adjacent &= trimmed.len() == rest.len();
        rest = trimmed;
        if let Some(after) = rest.strip_prefix("}}") {
            return Ok((tokens, after));
        }
        let Some(first) = rest.chars().next() else {
            return Err("an action is not closed; it ends with }}".into());
        };
        let (token, len) = match first {
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '|' => (Token::Pipe, 1),
            ',' => (Token::Comma, 1),
            '=' => (Token::Assign, 1),
            ':' if rest.starts_with(":=") => (Token::Assign, 2),
            '"' => string(rest)?,
            '`' => {
                let end = rest[1..].find('`').ok_or("a ` has no end")?;
                let text = rest[1..=end].to_owned();
                (Token::Literal(text.into()), end + 2)
            }
            '.' => {
                let name = name_of(&rest[1..]);
                match name {
                    "" => (Token::Dot, 1),
                    name => (Token::Field(name.to_owned(), adjacent), 1 + name.len()),
                }
            }
            '$' => {
                let name = name_of(&rest[1..]);
                (Token::Variable(name.to_owned()), 1 + name.len())
            }
            '-' if !rest[1..].starts_with(|c: char| c.is_ascii_digit()) => (Token::Minus, 1),
            c if c.is_ascii_digit() || c == '-' => {
                let digits = |c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-'));
                let len = rest.find(digits).unwrap_or(rest.len());
                let number = serde_json::from_str::<serde_json::Number>(&rest[..len]);
                let number = number.map_err(|_| format!("{:?} is no number", &rest[..len]))?;
                (Token::Literal(Value::Number(number)), len)
            }
            c if c.is_alphabetic() || c == '_' => {
                let name = name_of(rest);
                let token = match name {
                    "true" => Token::Literal(true.into()),
                    "false" => Token::Literal(false.into()),
                    "nil" => Token::Literal(Value::Null),
                    name => Token::Word(name.to_owned()),
                };
                (token, name.len())
            }
            other => return Err(format!("{other:?} is not of a template's language")),
        };
        tokens.push(token);
        adjacent = true;
        rest = &rest[len..];
    }
}

fn name_of(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_'));
    &text[..end.unwrap_or(text.len())]
}

/// A quoted string, with Go's escapes.
fn string(text: &str) -> Result<(Token, usize), String> {
    let mut value = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((Token::Literal(value.into()), at + 1)),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some('r') => value.push('\r'),
                Some(c @ ('"' | '\\' | '\'')) => value.push(c),
                _ => return Err("an unknown escape in a string".into()),
            },
            c => value.push(c),
        }
    }
    Err("a \" has no end".into())
}

/// What ended a list of nodes.
#[derive(Debug, PartialEq)]
enum End {
    Text,
    Mark,
    Else,
    ElseIf(Vec<Token>),
}

impl End {
    fn word(&self) -> &'static str {
        match self {
            Self::Text => "",
            Self::Mark => "end",
            Self::Else | Self::ElseIf(_) => "else",
        }
    }
}

struct Parser {
    pieces: std::vec::IntoIter<Piece>,
    depth: usize,
}

impl Parser {
    fn nodes(&mut self) -> Result<(Vec<Node>, End), String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("it is nested more than {DEPTH_MAX} deep"));
        }
        let mut nodes = Vec::new();
        let end = loop {
            let tokens = match self.pieces.next() {
                None => break End::Text,
                Some(Piece::Text(text)) => {
                    if !text.is_empty() {
                        nodes.push(Node::Text(text));
                    }
                    continue;
                }
                Some(Piece::Action(tokens)) => tokens,
            };
            let word = match tokens.first() {
                Some(Token::Word(word)) => word.as_str(),
                _ => "",
            };
            let rest = tokens.get(1..).unwrap_or_default();
            match word {
                "end" => break End::Mark,
                "else" if rest.first() == Some(&Token::Word("if".into())) => {
                    break End::ElseIf(rest[1..].to_vec());
                }
                "else" => break End::Else,
                "if" => nodes.push(self.condition(rest)?),
                "with" => {
                    let pipe = whole(rest)?;
                    let (body, otherwise) = self.body("with")?;
                    nodes.push(Node::With(pipe, body, otherwise));
                }
                "range" => nodes.push(self.range(rest)?),
                _ => nodes.push(match tokens.as_slice() {
                    [] => return Err("{{}} says nothing".into()),
                    [Token::Variable(name), Token::Assign, pipe @ ..] => {
                        Node::Set(name.clone(), whole(pipe)?)
                    }
                    pipe => Node::Show(whole(pipe)?),
                }),
            }
        };
        self.depth -= 1;
        Ok((nodes, end))
    }

    fn condition(&mut self, tokens: &[Token]) -> Result<Node, String> {
        let pipe = whole(tokens)?;
        let (body, end) = self.nodes()?;
        let otherwise = match end {
            End::Mark => Vec::new(),
            End::Else => self.last("if")?,
            End::ElseIf(tokens) => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    return Err(format!("it has more than {DEPTH_MAX} {{{{else if}}}}"));
                }
                let node = self.condition(&tokens)?;
                self.depth -= 1;
                vec![node]
            }
            End::Text => return Err("{{if}} has no {{end}}".into()),
        };
        Ok(Node::If(pipe, body, otherwise))
    }

    fn body(&mut self, word: &str) -> Result<(Vec<Node>, Vec<Node>), String> {
        let (body, end) = self.nodes()?;
        match end {
            End::Mark => Ok((body, Vec::new())),
            End::Else => Ok((body, self.last(word)?)),
            _ => Err(format!("{{{{{word}}}}} has no {{{{end}}}}")),
        }
    }

    fn last(&mut self, word: &str) -> Result<Vec<Node>, String> {
        match self.nodes()? {
            (nodes, End::Mark) => Ok(nodes),
            _ => Err(format!(
                "the {{{{else}}}} of {{{{{word}}}}} has no {{{{end}}}}"
            )),
        }
    }

    fn range(&mut self, tokens: &[Token]) -> Result<Node, String> {
        let (key, value, pipe) = match tokens {
            [
                Token::Variable(key),
                Token::Comma,
                Token::Variable(value),
                Token::Assign,
                pipe @ ..,
            ] => (Some(key.clone()), Some(value.clone()), pipe),
            [Token::Variable(value), Token::Assign, pipe @ ..] => (None, Some(value.clone()), pipe),
            pipe => (None, None, pipe),
        };
        let over = whole(pipe)?;
        let (body, otherwise) = self.body("range")?;
        Ok(Node::Range(Range {
            key,
            value,
            over,
            body,
            otherwise,
        }))
    }
}

/// A pipe that is all there is.
fn whole(tokens: &[Token]) -> Result<Pipe, String> {
    match pipe(tokens, 0)? {
        (pipe, []) => Ok(pipe),
        (_, _) => Err("a ) has no (".into()),
    }
}

/// A pipe, up to the end or a `)`, and the tokens from there on.
fn pipe(tokens: &[Token], depth: usize) -> Result<(Pipe, &[Token]), String> {
    if depth > DEPTH_MAX {
        return Err(format!("it is nested more than {DEPTH_MAX} deep"));
    }
    let mut commands = Vec::new();
    let mut terms = Vec::new();
    let mut rest = tokens;
    let done = |terms: &mut Vec<Term>, commands: &mut Vec<Command>| match terms.is_empty() {
        true => Err("a value is missing".to_owned()),
        false => {
            commands.push(Command(std::mem::take(terms)));
            Ok(())
        }
    };
    while let Some((token, after)) = rest.split_first() {
        rest = after;
        let base = match token {
            Token::Close => {
                done(&mut terms, &mut commands)?;
                return Ok((Pipe(commands), &tokens[tokens.len() - after.len() - 1..]));
            }
            Token::Pipe => {
                done(&mut terms, &mut commands)?;
                continue;
            }
            Token::Word(word) => {
                terms.push(Term::Function(word.clone()));
                continue;
            }
            Token::Literal(value) => {
                terms.push(Term::Literal(value.clone()));
                continue;
            }
            Token::Comma | Token::Assign | Token::Minus => {
                return Err("a , - or := stands where a value should".into());
            }
            Token::Field(name, _) => {
                let (mut names, after) = fields(rest);
                names.insert(0, name.clone());
                rest = after;
                terms.push(Term::Path(Base::Dot, names));
                continue;
            }
            Token::Dot => Base::Dot,
            Token::Variable(name) => Base::Variable(name.clone()),
            Token::Open => {
                let (inner, after) = pipe(rest, depth + 1)?;
                let Some((Token::Close, after)) = after.split_first() else {
                    return Err("a ( has no )".into());
                };
                rest = after;
                Base::Pipe(inner)
            }
        };
        let (names, after) = fields(rest);
        rest = after;
        terms.push(Term::Path(base, names));
    }
    done(&mut terms, &mut commands)?;
    Ok((Pipe(commands), rest))
}

/// The fields that follow at once.
fn fields(mut tokens: &[Token]) -> (Vec<String>, &[Token]) {
    let mut names = Vec::new();
    while let Some((Token::Field(name, true), after)) = tokens.split_first() {
        names.push(name.clone());
        tokens = after;
    }
    (names, tokens)
}
