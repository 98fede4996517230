"""The words of the report, in English and Japanese. Every name is in both; tests/test_report.py says so."""

from __future__ import annotations

LANGUAGES = ("en", "ja")

WORDS: dict[str, dict[str, tuple[str, str]]] = {
    # Labels of the page and of the pictures.
    "page": {
        "title": ("Decision record", "判定の記録"),
        "subtitle": (
            "How the KL penalty was set for every preference pair, from what, and with what effect",
            "選好ペアごとに KL ペナルティがどう決まり、何に基づき、どう働いたか",
        ),
        "skip": ("Skip to the summary", "要約へ移動"),
        "contents": ("Contents", "目次"),
        "summary": ("Summary", "要約"),
        "alarms": ("Points to look at", "確認項目"),
        "picture": ("Margin and KL difference", "マージンと KL の差"),
        "beta": ("The KL penalty β", "KL ペナルティ β"),
        "shares": ("Decisions", "判定の内訳"),
        "curves": ("Training over steps", "学習の推移"),
        "labels": ("By category", "カテゴリ別"),
        "flips": ("Pairs that changed decision", "判定が変わったペア"),
        "extremes": ("Most relaxed and most tightened pairs", "最も緩和・強化されたペア"),
        "table": ("All pairs carried in this file", "このファイルに収めたペア"),
        "audit": ("Audit of the record", "記録の監査"),
        "settings": ("Settings and sampling", "設定と抽出方法"),
        "run": ("Run", "実行"),
        "method": ("method", "手法"),
        "made": ("made by", "作成"),
        "relaxed": ("relaxed", "緩和"),
        "kept": ("kept", "維持"),
        "tightened": ("tightened", "強化"),
        "flipped": ("changed", "変化あり"),
        "vetoed": ("withheld by a second signal", "第二の信号により保留"),
        "any": ("any", "すべて"),
        "look": ("look", "要確認"),
        "fine": ("fine", "問題なし"),
        "none": ("does not apply", "対象外"),
        "rule": ("Rule", "基準"),
        "measured": ("Measured", "測定値"),
        "state": ("State", "状態"),
        "alarm": ("Point", "項目"),
        "step": ("step", "ステップ"),
        "optimizer_step": ("optimizer step", "最適化ステップ"),
        "epoch": ("epoch", "エポック"),
        "decision": ("decision", "判定"),
        "last_decision": ("last decision", "最後の判定"),
        "margin": ("margin", "マージン"),
        "kl_difference": ("KL difference", "KL の差"),
        "axis_margin": ("margin (nats)", "マージン(nat)"),
        "axis_kl": ("KL chosen − KL rejected (nats)", "KL(好ましい応答)− KL(好ましくない応答)(nat)"),
        "line": ("margin = KL difference", "マージン = KL の差"),
        "running_beta": ("running β", "現在の β"),
        "pair_beta": ("β of the pairs", "各ペアの β"),
        "share": ("share of pairs", "ペアの割合"),
        "reward_margin": ("reward margin", "報酬マージン"),
        "accuracy": ("reward accuracy", "報酬の正解率"),
        "kl_chosen": ("KL, chosen (nats/token)", "KL、好ましい応答(nat/トークン)"),
        "kl_rejected": ("KL, rejected (nats/token)", "KL、好ましくない応答(nat/トークン)"),
        "entropy_chosen": ("entropy, chosen (nats/token)", "エントロピー、好ましい応答(nat/トークン)"),
        "entropy_rejected": ("entropy, rejected (nats/token)", "エントロピー、好ましくない応答(nat/トークン)"),
        "training": ("training", "学習"),
        "evaluation": ("evaluation", "評価"),
        "pair": ("pair", "ペア"),
        "row": ("row", "行"),
        "label": ("category", "カテゴリ"),
        "visits": ("visits", "回数"),
        "changes": ("changes", "変化"),
        "lean": ("mean lean", "平均の偏り"),
        "pairs": ("pairs", "ペア数"),
        "decisions": ("decisions", "判定数"),
        "from_to": ("from ↓ to →", "前回 ↓ 次回 →"),
        "prompt": ("prompt", "プロンプト"),
        "chosen": ("chosen answer", "好ましい応答"),
        "rejected": ("rejected answer", "好ましくない応答"),
        "history": ("Every visit of this pair", "このペアの全記録"),
        "texts": ("Texts", "本文"),
        "no_texts": (
            "Texts are not in this file: it was made without --texts.",
            "本文はこのファイルに含まれていません(--texts なしで作成)。",
        ),
        "no_text_of_pair": (
            "The text of this pair is not carried: the budget for texts was used up, the record has no id of the pair, "
            "or the data set has changed or can't be read again.",
            "このペアの本文は収録されていません(容量の上限、ID の欠落、データの変更、または再読み込み不可による)。",
        ),
        "open": ("Open pair", "ペアを開く"),
        "close": ("Close", "閉じる"),
        "filter": ("Filter", "絞り込み"),
        "clear": ("Clear", "解除"),
        "search": ("id or row", "ID または行"),
        "least": ("at least", "以上"),
        "most": ("at most", "以下"),
        "found": ("{n} of {of} pairs", "{of} ペア中 {n} ペア"),
        "sort_hint": (
            "Column headings sort. A pair's id opens its history.",
            "見出しで並べ替え、ID でそのペアの記録を開きます。",
        ),
        "page_of": ("page {n} of {of}", "{of} ページ中 {n} ページ"),
        "previous": ("Previous", "前へ"),
        "next": ("Next", "次へ"),
        "nothing": ("Nothing here.", "該当なし。"),
        "chart_hint": (
            "Arrow keys move the reading along a chart that has the focus.",
            "グラフにフォーカスして矢印キーを押すと、値を順に読めます。",
        ),
        "dot_hint": (
            "Above the line the check relaxes, below it tightens; near it pairs are kept.",
            "線より上は緩和、下は強化の側で、線の近くは維持となります。",
        ),
        "map_hint": ("The darker, the more of the step's pairs.", "濃いほど、そのステップのペアが多いことを示します。"),
        "part": ("part", "パート"),
        "unchecked": ("Not checked", "確認できなかった点"),
        "digest": ("SHA-256 of the record's end", "記録の終端の SHA-256"),
        "place": ("row of the part", "パート内の行"),
        "column": ("column", "列"),
        "holds": ("holds", "記録の値"),
        "follows": ("follows", "再計算による値"),
        "kind": ("finding", "内容"),
        "option": ("option", "設定"),
        "value": ("value", "値"),
        "once": (
            "Every pair was seen once: there is no second decision to compare with.",
            "各ペアは 1 回ずつしか使われておらず、比較できる 2 回目の判定がありません。",
        ),
        "unknown_pairs": (
            "The record does not say which pairs its rows are of, so a second decision can't be told from a first.",
            "どのペアの行か記録されていないため、2 回目の判定を見分けられません。",
        ),
        "no_labels": (
            "The record carries no category (train with --label_column).",
            "カテゴリは記録されていません(学習時に --label_column を指定)。",
        ),
        "labels_more": (
            "The {n} largest of {of} categories are shown.",
            "{of} カテゴリのうち、大きい順に {n} 件を示します。",
        ),
        "lean_hint": (
            "Lean is margin − KL difference, in nats: how far from the line, mean over visits. Pairs are ordered by "
            "relaxed minus tightened visits, then by lean.",
            "「偏り」はマージン − KL の差(nat)、つまり線からの距離で、全回の平均です。(緩和の回数 − 強化の回数)、"
            "次に偏りの順に並べています。",
        ),
    },
    "history": {
        "step": ("step", "ステップ"),
        "epoch": ("epoch", "エポック"),
        "decision": ("decision", "判定"),
        "vetoed": ("withheld", "保留"),
        "beta": ("running β", "現在の β"),
        "beta_used": ("β used", "使用した β"),
        "margin": ("margin, nats", "マージン(nat)"),
        "relaxed_shift": ("shift if relaxed, nats", "緩和時の変化(nat)"),
        "tightened_shift": ("shift if tightened, nats", "強化時の変化(nat)"),
        "chosen_kl": ("KL chosen, nats", "KL 好ましい応答(nat)"),
        "rejected_kl": ("KL rejected, nats", "KL 好ましくない応答(nat)"),
        "loss": ("loss, nats", "損失(nat)"),
        "coefficient": ("weight in the gradient", "勾配での重み"),
        "chosen_logp": ("log-prob chosen", "対数確率 好ましい応答"),
        "rejected_logp": ("log-prob rejected", "対数確率 好ましくない応答"),
        "ref_chosen_logp": ("reference chosen", "参照モデル 好ましい応答"),
        "ref_rejected_logp": ("reference rejected", "参照モデル 好ましくない応答"),
        "chosen_entropy": ("entropy chosen", "エントロピー 好ましい応答"),
        "rejected_entropy": ("entropy rejected", "エントロピー 好ましくない応答"),
        "chosen_tokens": ("tokens chosen", "トークン数 好ましい応答"),
        "rejected_tokens": ("tokens rejected", "トークン数 好ましくない応答"),
    },
    # Sentences of the summary.
    "summary": {
        "size": (
            "The run trained on {pairs} pairs in {steps} steps (passes over the data: {epochs}): {rows} rows "
            "of the record.",
            "{pairs} ペアを {steps} ステップ(データ {epochs} 周)で学習し、{rows} 行を記録しました。",
        ),
        "size_only": (
            "The run trained in {steps} steps: {rows} rows of the record, which don't all say which pair they are of.",
            "{steps} ステップで学習し、{rows} 行を記録しました。どのペアのものか不明な行があります。",
        ),
        "beta_lower": (
            "The KL penalty β went from {first} to {last}, {change} lower: the model may now move further from the "
            "reference than at the start.",
            "KL ペナルティ β は {first} から {last} へ {change} 下がりました。"
            "開始時より、参照モデルから離れやすくなっています。",
        ),
        "beta_higher": (
            "The KL penalty β went from {first} to {last}, {change} higher: the model is now held closer to the "
            "reference than at the start.",
            "KL ペナルティ β は {first} から {last} へ {change} 上がりました。"
            "開始時より、参照モデルに強く引き寄せられています。",
        ),
        "beta_same": ("The KL penalty β stayed at {first}.", "KL ペナルティ β は {first} のまま変わりませんでした。"),
        "shares": (
            "The penalty was relaxed for {relaxed} of the pairs, kept for {kept} and tightened for {tightened}.",
            "ペナルティの判定は、緩和 {relaxed}、維持 {kept}、強化 {tightened} でした。",
        ),
        "no_decisions": (
            "The method ({method}) sets no penalty pair by pair, so nothing was relaxed or tightened.",
            "この手法({method})はペアごとにペナルティを決めないため、緩和や強化はありません。",
        ),
        "vetoed": (
            "A second signal withheld {n} relaxations.",
            "第二の信号により、{n} 件の緩和が保留されました。",
        ),
        "learnt": (
            "In the last tenth of the steps the model had moved towards the chosen answer, compared with the "
            "reference, in {accuracy} of the pairs; the mean margin was {margin} nats.",
            "最後の 1 割のステップでは、{accuracy} のペアで参照モデルに比べて好ましい応答の側へ動いており、"
            "マージンの平均は {margin} nat でした。",
        ),
        "kl": (
            "By then it was {kl} nats a token away from the reference.",
            "その時点での参照モデルからの距離は、1 トークンあたり {kl} nat です。",
        ),
        "flips": (
            "{flipped} of {pairs} pairs that were seen again changed decision at least once.",
            "2 回以上使われた {pairs} ペアのうち、{flipped} ペアで判定が少なくとも 1 回変わりました。",
        ),
        "nothing": ("Nothing needs a look.", "確認が必要な項目はありません。"),
        "look": ("Needs a look: {names}.", "確認が必要な項目: {names}。"),
        "audit_ok": (
            "The record agrees with itself: {rows} rows were worked out again.",
            "記録に矛盾はありません。{rows} 行をすべて再計算して確かめました。",
        ),
        "audit_bad": (
            "The record does not agree with itself: {n} findings, listed under the audit.",
            "記録に矛盾があります。{n} 件を監査の欄に示します。",
        ),
    },
    # Names, rules and measurements of the alarms.
    "alarms": {
        "finite": ("Figures that are not finite", "有限でない値"),
        "finite_rule": (
            "A loss, log-probability, shift, KL or entropy of a pair is not a finite number. Accuracy and margin in "
            "the summary leave such pairs out; KL is not known with them, and curves have a gap there.",
            "ペアの損失・対数確率・シフト・KL・エントロピーのいずれかが有限な数でない。"
            "要約の正答率とマージンはそのようなペアを除く。KL は不明となり、曲線ではその箇所が途切れる。",
        ),
        "finite_measured": ("rows: {n}, the first at step {step}", "{n} 行(最初はステップ {step})"),
        "drift": ("β drifting", "β の変動"),
        "drift_rule": (
            "β at the end is more than {factor} times, or less than 1/{factor} of, β at the start.",
            "終了時の β が、開始時の {factor} 倍を超えるか、1/{factor} を下回る。",
        ),
        "drift_measured": ("× {value}", "{value} 倍"),
        "takeover": ("One decision taking over", "判定の偏り"),
        "takeover_rule": (
            "In the last quarter of the steps, one decision takes more than {share} of the pairs.",
            "最後の 1/4 のステップで、1 種類の判定が {share} を超える。",
        ),
        "takeover_measured": ("{name}: {value}", "{name}: {value}"),
        "runaway": ("KL running away", "KL の急増"),
        "runaway_rule": (
            "In the last tenth of the steps KL from the reference is above {bound} nats a token; or above {low}, and "
            "more than {factor} times what it was in the tenth at the middle of the run.",
            "最後の 1 割のステップで、参照モデルからの KL が 1 トークンあたり {bound} nat を超える。"
            "または {low} nat を超え、"
            "かつ実行の中間の 1 割での値の {factor} 倍を超える。",
        ),
        "runaway_measured": (
            "{value} nats a token, {middle} at the middle",
            "{value} nat/トークン(中間では {middle})",
        ),
        "label": ("A category relaxed far more", "特定カテゴリへの緩和の偏り"),
        "label_rule": (
            "A category with at least {least} decisions is relaxed {points} percentage points more often than all "
            "others together, and by more than {errors} standard errors.",
            "判定が {least} 件以上のカテゴリで、緩和の割合がその他全体を {points} ポイント以上上回り、"
            "その差が標準誤差の {errors} 倍を超える。",
        ),
        "label_measured": (
            "{name}: {value} relaxed, others {others}",
            "{name}: 緩和 {value}、その他 {others}",
        ),
        "reference": ("Reference prefers the rejected answers", "参照モデルの質"),
        "reference_rule": (
            "The reference gives the rejected answer the higher log-probability in more than half of the pairs, by "
            "more than {errors} standard errors. Log-probabilities are sums, so shorter answers are favoured.",
            "参照モデルの対数確率が、好ましくない応答の方で高いペアが半数を超え、"
            "その差が標準誤差の {errors} 倍を超える。"
            "対数確率は合計なので、短い応答ほど高くなる点に注意。",
        ),
        "reference_measured": ("{value} of {pairs} pairs", "{pairs} ペアのうち {value}"),
        "audit": ("Record does not agree with itself", "記録の矛盾"),
        "audit_rule": (
            "The audit finds a figure that does not follow from the others, or something missing or twice.",
            "監査により、他の値と合わない値、欠落、または重複が見つかる。",
        ),
        "audit_measured": ("{n} findings", "{n} 件"),
    },
    "findings": {
        "value": ("a figure that does not follow", "再計算と合わない値"),
        "unreadable": ("a part that can't be read", "読み取れないパート"),
        "chain": ("a part altered, moved or removed after it was written", "書き込み後に変更・移動・削除されたパート"),
        "gap": ("steps or micro-batches missing", "ステップまたはマイクロバッチの欠落"),
        "rank": ("a process that is missing or lacks steps", "プロセスまたはそのステップの欠落"),
        "short": ("a step with fewer pairs", "ペアの足りないステップ"),
        "double": ("a pair that comes again", "ペアの重複"),
        "missing": ("pairs missing", "ペアの欠落"),
        "id": ("a row with two ids", "1 行に 2 つの ID"),
        "end": ("the record ends before its run", "実行より先に終わる記録"),
    },
    # What the audit could not check.
    "limits": {
        "open": (
            "The record of rank {ranks} was not closed: the run was killed, or goes on. What it did after its last "
            "part (the record reaches to step {step}) is not in it.",
            "ランク {ranks} の記録は閉じられていません。実行が強制終了されたか、継続中です。"
            "最後のパート(記録はステップ {step} まで)より後は記録にありません。",
        ),
        "late_part": (
            "{part} is newer than the end that the record names: the run was killed just then, or the part was added.",
            "{part} は、記録の終端より後に書かれています。その瞬間に実行が強制終了されたか、後から追加されたものです。",
        ),
        "begins_after": (
            "The record begins after step {step}, where the run was resumed: nothing before it is checked, and the β "
            "that it began with can't be.",
            "記録は実行が再開されたステップ {step} の後から始まります。それ以前と、開始時の β は確認できません。",
        ),
        "states_of_others": (
            "The folder held states of another run when this one began; they don't count: {states}.",
            "開始時のフォルダにあった別の実行の状態は数えていません: {states}。",
        ),
        "no_row": (
            "{n} rows of {split} don't say which row of the data they are, so pairs that are missing or come twice "
            "don't show there.",
            "{split} の {n} 行はデータの行番号が不明のため、欠落や重複を確認できません。",
        ),
        "no_id": (
            "{n} rows of {split} have no id, so their texts can't be told from others.",
            "{split} の {n} 行は ID がないため、本文を照合できません。",
        ),
        "no_epoch": (
            "{n} rows of {split} don't say which epoch they are of, so pairs that are missing or come twice, and short "
            "steps, don't show there.",
            "{split} の {n} 行はエポックが不明のため、ペアの欠落や重複、ペアの足りないステップを確認できません。",
        ),
        "no_pairs": (
            "The run did not say how many pairs {split} has, so pairs that are missing, or come twice in an epoch, "
            "don't show there.",
            "{split} のペア数が実行時に記録されていないため、欠落や 1 エポック内の重複を確認できません。",
        ),
        "last_epoch": (
            "The last epoch holds {n} of {of} pairs; whether it was to go on is not known.",
            "最後のエポックには {of} ペアのうち {n} ペアがあります。そこで終わる予定だったかは分かりません。",
        ),
        "no_ranks": (
            "The run did not say how many processes kept a record, so one that is missing as a whole doesn't show.",
            "記録したプロセスの数が実行時に記録されていないため、プロセス全体の欠落を確認できません。",
        ),
        "no_batch_size": (
            "{n} training steps hold fewer pairs than {usual}, as many as most, and the run stated no batch size: "
            "whether they lack any is not known.",
            "学習 {n} ステップのペア数が大半の {usual} より少なく、バッチサイズの記録もないため、欠落か分かりません。",
        ),
        "ignore_data_skip": (
            "ignore_data_skip is set: a run that is resumed begins its epoch's data again, so pairs that come twice "
            "don't show.",
            "ignore_data_skip が設定され、再開時にエポックのデータを最初から使うため、重複を確認できません。",
        ),
        "drop_last": (
            "dataloader_drop_last is set and the run stated no batch size: how many pairs an epoch leaves out, and so "
            "whether more are missing, is not known.",
            "dataloader_drop_last が設定され、バッチサイズの記録がないため、除かれたペアと欠落を区別できません。",
        ),
        "stream": (
            "{split} came as a stream: a row is a place in one pass, and whether a pass is whole can't be told.",
            "{split} はストリームです。行番号は 1 周の中の位置であり、1 周が揃っているかは確認できません。",
        ),
    },
    # What was sampled, joined and left out.
    "notes": {
        "record_only": (
            "Every figure here is from the record in the run's folder; nothing was computed by a model.",
            "この報告の数値はすべて実行フォルダの記録によるもので、モデルによる再計算は行っていません。",
        ),
        "counted": (
            "rows: {rows}, training steps: {steps}, parts: {parts}",
            "{rows} 行、学習 {steps} ステップ、{parts} パート",
        ),
        "dots_all": ("The picture shows all {n} decisions.", "図には {n} 件の判定をすべて示しています。"),
        "dots_some": (
            "The picture shows {n} of {of} decisions, drawn evenly at random.",
            "図には {of} 件の判定から無作為に選んだ {n} 件を示しています。",
        ),
        "pairs_all": ("The table carries all {n} pairs.", "表には {n} ペアをすべて収めています。"),
        "pairs_some": (
            "The table carries {n} of {of} pairs: those that the audit names, the most changed, the most relaxed and "
            "the most tightened, then others drawn at random. All other figures are of all pairs.",
            "表には {of} ペアのうち {n} ペアを収めています。"
            "監査で指摘されたペア、判定の変化・緩和・強化が最も大きいペア、"
            "残りは無作為に選んだペアです。表以外の数値はすべてのペアによるものです。",
        ),
        "binned": (
            "A point of a curve is the mean of {n} steps.",
            "曲線の 1 点は {n} ステップの平均です。",
        ),
        "texts": (
            "Texts were found in {source} by their ids: {n} pairs. Handle this file as you handle the "
            "data. Texts longer than {cut} characters are cut, and say so; "
            "control and direction marks are shown as ⟨U+…⟩.",
            "本文は {source} から ID で照合しました({n} ペア)。"
            "このファイルは元データと同じように扱ってください。"
            "{cut} 文字を超える本文は、その旨を示して省略しています。制御文字や書字方向の記号は ⟨U+…⟩ と表示します。",
        ),
        "texts_changed": (
            "{n} pairs are not in the data set with the texts that they were trained on; their texts are left out.",
            "{n} ペアは学習時の本文がデータにないため、本文を載せていません。",
        ),
        "texts_no_id": (
            "{n} pairs have no id in the record, by which their texts could be found.",
            "{n} ペアは記録に ID がないため、本文を照合できません。",
        ),
        "no_source": (
            "run.json names no file of the data set, which came as a stream or was made in memory: no text of it is in "
            "this file.",
            "データがストリームまたはメモリ上で作られたため、run.json にファイル名がなく、本文を載せていません。",
        ),
        "no_texts": (
            "No text of the data set is in this file; ids and rows lead there.",
            "データの本文はこのファイルに含まれていません。ID と行番号で元データをたどれます。",
        ),
        "cut": (" … {n} more characters", " … 以下 {n} 文字省略"),
        "training_only": (
            "Decisions, pairs and the table are of training; evaluation appears in the curves.",
            "判定・ペア・表は学習時のものです。評価は推移の図に示します。",
        ),
    },
}


def words(section: str, language: str) -> dict[str, str]:
    """One section in one language."""
    return {name: both[LANGUAGES.index(language)] for name, both in WORDS[section].items()}
