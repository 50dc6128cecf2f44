# SPDX-License-Identifier: Apache-2.0
"""Text written for training the small tokenizer: prose, several languages, code, chat, numbers."""

TEXTS = [
    """A coordinator routes every request to a pipeline of workers. Each worker serves a few layers of the model and
keeps the latent cache of the sequences that run through it. When a worker goes away, another one takes its layers, the
cache is rebuilt, and the person who is reading the answer sees nothing but a short pause. The tokens stay the same.
""",
    """In the morning the ferry crosses the strait. The water is grey, then green, then blue. On the other side there is a
small town with a market, a school and a library. People there say that the sea gives and the sea takes; they mend their
nets, they drink their tea, and they talk about the weather as if it were an old friend who never writes.
""",
    """How do I boil an egg? Put it into boiling water for seven minutes, then into cold water. Why does ice float? Because
ice is less dense than water. What is the capital of France? Paris. Who wrote this? We did, and it isn't very good, but
it's ours, and you'll find that it doesn't matter: they'd have done the same, I'm sure, and we've said so.
""",
    """def fibonacci(n):
    a, b = 0, 1
    for i in range(n):
        a, b = b, a + b
    return a


class Counter:
    def __init__(self, start=0):
        self.value = start

    def next(self):
        self.value += 1
        return self.value


if __name__ == "__main__":
    print(fibonacci(10))
    for name in ["one", "two", "three"]:
        print(name, len(name))
""",
    """#include <string>
#include <vector>

namespace example {

struct Point {
  int x = 0;
  int y = 0;
};

int Sum(const std::vector<int>& values) {
  int total = 0;
  for (const int value : values) total += value;
  return total;
}

}  // namespace example

int main() { return example::Sum({1, 2, 3}) == 6 ? 0 : 1; }
""",
    """{"name": "strait", "version": "1.0", "list": [1, 2, 3], "nested": {"true": true, "null": null, "text": "some text"}}
{"role": "user", "content": "What is the weather in Berlin?"}
{"role": "assistant", "content": "It is 12 degrees and it rains."}
""",
    """Der Fluss fließt durch die Stadt und unter den Brücken hindurch. Über den Dächern ist der Himmel grau, aber die
Menschen gehen auf den Markt und kaufen Brot, Käse und Äpfel. Sie sprechen über das Wetter und über ihre Kinder.
""",
    """Le bateau traverse la mer et la ville s'éveille. Les enfants vont à l'école, les marchés ouvrent, et l'on parle du
temps qu'il fait. C'est une journée comme les autres, peut-être un peu plus belle.
""",
    """El barco cruza el mar por la mañana. Los niños van a la escuela y la gente habla del tiempo, del pan y de la vida.
""",
    """Утром паром идёт через пролив. Вода сначала серая, потом зелёная, потом синяя. Люди говорят о погоде и пьют чай.
""",
    """我们在早上坐船过海。海水是蓝色的，天空也是蓝色的。人们在市场上买东西，说着天气和孩子。你好，世界！我们的模型有很多层，每一层都有自己的缓存。
""",
    """朝、船は海を渡ります。水は青く、空も青いです。人々は市場で買い物をして、天気の話をします。これはテストです。ありがとうございます。
""",
    """아침에 배가 바다를 건넌다. 물은 파랗고 하늘도 파랗다. 사람들은 시장에서 물건을 산다.
""",
    """في الصباح تعبر السفينة البحر. الماء أزرق والسماء زرقاء. الناس يتحدثون عن الطقس.
""",
    """सुबह नाव समुद्र पार करती है। पानी नीला है और आकाश भी नीला है। लोग बाज़ार में बात करते हैं।
""",
    """1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 50, 100, 200, 250, 500, 1000, 1024, 2024, 2025, 2026, 3.14, 2.72, 0.001, 65536.
| name | value |
|------|-------|
| one  | 1     |
| two  | 2     |

- first item
- second item
  - nested item

# Title

## Section

Some text, (in brackets), "quoted", 'single', `code`, and **bold**. 😀 👍 ❤️ → ← ≤ ≥ … — –
""",
]
