# SPDX-License-Identifier: Apache-2.0
"""Strings on which tokenizers differ: what make_tokenizer.py records and check_tokenizer.py compares.

A string is given as text, or as [piece, times] for what would be long in a file.
"""

import random

WORDS = [
    "", " ", "a", "A", "hello", "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "don't we'll I'm you've they're she'd it's", "DON'T WE'LL", "naïve café résumé", "ﬁne ﬂow",
    "x", "xx", "xxx", "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "a.b.c", "e.g. i.e. etc.", "U.S.A.", "http://example.com/path?query=1&b=two#frag",
    "user@example.com", "C:\\Windows\\System32", "/usr/local/bin/strait", "100%", "$5.00", "€10",
    "«quoted» “curly” ‘single’ „low“", "em—dash en–dash minus− hyphen-", "ellipsis… dots...",
    "_underscore_ __dunder__", "#hashtag @mention", "C++ C# F#", "!important", "?what", ".hidden",
    "!a !B !é !1", "@Ab #cD $Ef", "-x -X -é", "~tilde ^caret `tick`", "[a] (b) {c} <d>", "\\n \\t",
    "word.Word,word;Word:word", "a-b_c.d/e", "1st 2nd 3rd", "x1 1x x1x", "v2.5.1-rc3+build.7",
]

DIGITS = [
    "0", "12", "123", "1234", "12345", "123456", "1234567890", "3.14159", "1,000,000", "0x1F", "1e-9",
    "2026-01-02T03:04:05Z", "192.168.0.1:8080", "٣٤٥٦", "१२३४५", "１２３４", "½ ¼ ¾ ⅓", "²³¹ x² x₂",
    "ⅣⅫ ⅷ", "①②③④", "㉑㊿", "〇一二三", "𝟘𝟙𝟚𝟛𝟜", "12ab34cd56", "1 2 3", "1\n2\r\n3", "007", "1٢3",
    "999999999999999999999999999999", "-1 +2 ±3", "1️⃣2️⃣", "𐄇𐄈", "𑁒𑁓", "௰௱", "꩐꩑", "𞅀𞅁",
]

SPACES = [
    "  ", "   ", "    ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "\r\n\r\n", " \n", "\n ",
    "  \n  ", "a  b", "a   b", "a \n b", "a\n\n\nb", "a\r\rb", "a \t b", "\ta", "a\t", " a", "a ", "  a",
    "a  ", " a ", "  a  ", "\n a", "a \n", "    indent", "\tindent", "trailing   ", "trailing \n",
    "\u00a0", "a\u00a0b", "\u00a0\u00a0x", "\u2003em\u2003", "\u2009thin", "\u200bzero", "a\u200bb",
    "\u3000ideographic\u3000", "\u1680ogham", "\u180emongolian", "a\u180eb", " \u180e ", "\u180e\u180e1",
    "\u2028line", "\u2029para", "\u0085next", "a\u0085b", "a\u0085\n", "\u202fnarrow", "\u205fmath", "\ufeffbom",
    "\v", "\f", "a\vb", "a\fb", " \v\f\n", "\u2060joiner", "!  a", "1  2", "你  好", "a \u3000 b",
    "\n\t\n\t", "if x:\n\n\n\n    y", "x \r\n y", "…\n", "!\n", "!\r\n!", " !\n\n", ".\n\n\n a", ")\r\n\r\n(",
]

CONTROL = [
    "\x00", "a\x00b", "\x00\x00", "\x01\x02\x03", "\x07bell", "\x08", "\x1b[31mred\x1b[0m", "\x7f",
    "a\x7fb", "\x80", "\x9f", "\xad", "soft\xadhyphen", "\u200e\u200f", "\u202aembed\u202c", "\ufff9\ufffa\ufffb",
    "\ufffc", "\ufffd", "a\ufffdb", "\ufffe", "\uffff", "\U0001ffff", "\U0010ffff", "\U0010fffe", "\ud7ff", "\ue000",
    "\uf8ff", "\U000f0000", "\U00100000x", "\ud7ff\ue000", "\U000e0001\U000e0041", "\x1c\x1d\x1e\x1f", "\x1cA",
]

SCRIPTS = [
    "Привет, мир!", "Съешь же ещё этих мягких французских булок", "Γειά σου Κόσμε", "Ὦ ἄνδρες Ἀθηναῖοι",
    "你好，世界", "中文没有空格的句子。", "繁體中文與简体中文", "天地玄黃宇宙洪荒", "日本語のテキスト", "カタカナとひらがな",
    "こんにちは世界", "東京都2024年", "ﾊﾝｶｸ ｶﾅ", "ー・゠", "゛゜ゝゞ", "㍿㌔㌧", "한국어 텍스트", "안녕하세요 세계",
    "ㄱㄴㄷ ㅏㅑ", "\u1112\u1161\u11ab", "مرحبا بالعالم", "السَّلامُ عَلَيْكُمْ", "פּוֹ שלום עולם", "שָׁלוֹם", "ܫܠܡܐ",
    "नमस्ते दुनिया", "हिन्दी में क्षत्रिय", "বাংলা ভাষা", "தமிழ் மொழி", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල",
    "สวัสดีชาวโลก", "ภาษาไทยไม่มีช่องว่าง", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "བོད་སྐད།", "ქართული ენა", "Հայերեն",
    "አማርኛ ቋንቋ", "ᏣᎳᎩ", "ᓀᐦᐃᔭᐍᐏᐣ", "ᚠᚢᚦᚨᚱᚲ", "ᠮᠣᠩᠭᠣᠯ", "𐌰𐌱𐌲", "𓀀𓁐", "𒀀𒀁", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𝒜𝓑𝒞",
    "ＦＵＬＬＷＩＤＴＨ", "ｆｕｌｌ　ｗｉｄｔｈ！", "ı İ ß ẞ ſ", "Ǆǅǆ", "ŉ ǰ ΐ", "Tiếng Việt", "Türkçe İstanbul", "Ĳ ĳ",
    "abc中文def日本語ghi", "中a文b", "カa1中", "中文，English；日本語。", "10年前", "第3章", "3か月", "龥龦鿿", "一㐀𠀀",
    "\u4dff\u4e00\u9fa5\u9fa6", "\u303f\u3040\u309f\u30a0\u30ff\u3100", "々〆〇", "「引用」『二重』", "、。！？",
    "mixedРусскийtextεδώ", "עברית English עברית", "\u202eRTL override\u202c", "ﷺ ﷽", "﴾﴿", "ﬀﬁﬂﬃ", "Ⅷ ℵ ℃ Å",
    "𖭐𖭑 𖩠", "𞤀𞤁 𞤢", "ꦲꦏ꧀ꦱꦫ", "ᬅᬓ᭄ᬱᬭ", "ꯃꯤꯇꯩ", "ⵜⴰⵎⴰⵣⵉⵖⵜ", "ⲘⲈⲦ", "ꙮ Ѯ", "ʰʷʲ ˈaɪ", "ɐɑɒ",
]

MARKS = [
    "e\u0301", "a\u0300\u0301\u0302\u0303", "\u0301", "\u0301a", " \u0301", "1\u0301", "!\u0301", "中\u0301", "\u0301\u0302",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢", "q\u0307\u0323", "\u1e9b\u0323", "가\u0301", "\u0e01\u0e38\u0e49", "x\u20d7", "a\u034fb", "\u20e3",
    "न\u093c", "\u094d", "ก\u0e33", "Å A\u030a", "\n\u0301", "\t\u0300x", ".\u0327\n", "\u0488", "a\u1ab0",
]

EMOJI = [
    "😀", "😀😃😄", "hi 😀 there", "😀a", "a😀", " 😀", "😀 ", "👍🏽", "👍🏻👍🏿", "👨‍👩‍👧‍👦", "👩‍💻", "🏳️‍🌈", "🏴‍☠️", "🇩🇪",
    "🇩🇪🇫🇷🇯🇵", "🇩", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️", "❤", "☺️", "✌🏾", "🤷🏽‍♀️", "👁️‍🗨️", "#️⃣", "*️⃣", "☎︎", "©️ ™", "♠♥♦♣", "✅❌", "🪿🫎",
    "\U0001fae8", "\U0001fa89", "🀄🃏", "🆗🆒", "→←↑↓⇒", "∀∃∈∉⊂", "∑∏∫√∞", "≤≥≠≈", "█▓▒░", "┌─┐│└┘", "⠓⠑⠇⠇⠕", "♔♕♖", "⚀⚁",
    "\u200d", "a\u200db", "\u200c", "می\u200cخواهم", "\ufe0f", "😀\ufe0f\u200d", "😵‍💫🫠", "🧑🏿‍🤝‍🧑🏻", "\U0001f3fb",
]

CODE = [
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}", "#include <vector>\n",
    "SELECT * FROM t WHERE a = 'b';", "<div class=\"x\">&nbsp;</div>", "{\"key\": [1, 2.5, null, true]}",
    "x = y if z else {w: v}", "a += b; c -= d; e *= f;", "!= == === <= >= => -> :: ... ?? ?. ||= &&",
    "/* comment */ // line", "<!-- html -->", "\\begin{equation}E=mc^2\\end{equation}", "$x_{i}^{2}$", "```python\nprint()\n```",
    "| a | b |\n|---|---|\n| 1 | 2 |", "- item\n  - nested\n\t- tab", "# Title\n\n## Sub\n", "**bold** _it_ ~~no~~", "%d %s %5.2f %%",
    "std::vector<std::pair<int,int>>", "fn main() -> Result<(), Box<dyn Error>> {}", "lambda x: x+1", "@decorator\nclass A: pass",
    "git commit -m \"x\" && git push", "curl -sS 'http://[::1]:8000/v1' | jq .", "0b1010 0o17 0xFF 1_000", "'\\u00e9' \"\\x41\"",
    "\t\tif (a)\n\t\t\tb();\n", "    \n    \n", "a\n    b\n        c\n", "}}}})))", "(((([[[[", "////----====____", "!!!???...",
    "a=1,b=2;c:3", "π = 3.14; Δx", "print('héllo')", ";;;\n\n;;;", "<?xml version=\"1.0\"?>", "&amp;&lt;", "^M\r\n$", "\"\"\"doc\"\"\"",
]

NEW_UNICODE = [
    "\u1c89\u1c8a", "x\ua7cby", "\ua7da1", " \U00010d4a\U00010d50", "\U00010d40\U00010d41\U00010d42\U00010d43", "\U0001e030b", "\U00031350\U00031351",
    "\U0002ebf0a", "中\U00031350中", "\u0897", "a\u0897", "\u0cf3 \u0ece", "\u1b4e\u1b4f!", "\u2427\u2428", "\u2ffc\u31ef", "\U0001fa75 \U0001fae9",
    "\U0001f6dc\n", "\U0001cc00\U0001cd00", "\U0001fbcb", "\U00011f50\U00011f51\U00011f52\U00011f53", "\U0001ccf0\U0001ccf1", "\U000116d0a", "\U00016d40\U00016d70",
    "\U0001e4d0\U0001e4ec", "\U0001e5d0 \U0001e5ff", "\U00013460x", "\U00011de0\U00011de1", "\U00016ff4",
]

LONG = [
    ["a", 1000], ["a", 20000], ["ab", 3000], ["abc", 1000], [" ", 1000], [" ", 5001], ["\n", 999], ["\t", 333], ["9", 1000],
    ["!", 777], ["=", 2000], ["-", 80], ["中", 1000], ["の", 500], ["😀", 300], ["é", 700], ["e\u0301", 400], ["\u0301", 300],
    ["A1", 500], ["the ", 400], ["lorem ipsum ", 100], ["\r\n", 300], ["\x00", 200], ["x\n", 300], ["1,", 300], ["한", 400],
    ["👨‍👩‍👧‍👦", 60], ["\ufffd", 100], ["aB", 900], ["antidisestablishmentarianism", 30], ["\u3000", 200], [" \u00a0", 150],
]


def added(tokens):
    """Strings around added tokens: alone, in the middle, doubled, overlapping, cut, with spaces."""
    out = []
    for t in tokens:
        out += [t, "a" + t + "b", " " + t + " ", t + t, "x " + t + "\n" + t + "  y"]
    out += ["".join(tokens), " ".join(tokens), "\n".join(tokens)]
    for t in tokens[:6]:
        out += [t[:-1], t[1:], t[:-1] + t, t + t[1:], "<" + t + ">", t.upper(), t.replace("｜", "|")]
    return out


def fuzz(seed, count, tokens):
    """Random strings from an alphabet in which every class of the pre-tokenizers is well represented."""
    rng = random.Random(seed)
    alphabet = list("aAbzZ019 .,!?'\"-_\n\r\t \u00a0\u3000éßяЖ中一龥のカ한עم๐😀👍🏽\u200d\u0301\u0300\u180e\u0085½²€+<|>") + list(tokens)
    out = []
    for _ in range(count):
        out.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 24))))
    return out


def wild(seed, count):
    """Random code points of the whole of Unicode."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 40)):
            c = rng.randrange(0x110000) if rng.random() < 0.5 else rng.randrange(0x3200)
            text += " " if 0xD800 <= c <= 0xDFFF else chr(c)
        out.append(text)
    return out


def all_strings(tokens):
    plain = WORDS + DIGITS + SPACES + CONTROL + SCRIPTS + MARKS + EMOJI + CODE + NEW_UNICODE
    plain += added(tokens)
    for s in ("\ud800", "\udfff"):
        assert s not in plain
    return plain + LONG


def expand(entry):
    return entry if isinstance(entry, str) else entry[0] * entry[1]
